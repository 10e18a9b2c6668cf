"""From a checkpoint on the command line to a folder that stock transformers opens."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from layerwise.cli import run
from layerwise.patterns import NM
from layerwise.run.outputs.output import Manifest
from layerwise.run.pipeline.journal import read_masks
from layerwise.run.prune import prune_model
from tests.support.models import (
    SHARD,
    edit_shard,
    mixture_of_experts,
    random_tokens,
    save_checkpoint,
    tiny_model,
    tiny_text,
)

FAMILIES = ["mamba", "falcon_mamba", "mamba2", "gemma", "gemma3_text", "gpt2", "qwen3"]
SETTINGS: dict[str, Any] = {"n_sequences": 4, "sequence_length": 12}


def command(folder: Path, *more: str) -> list[str]:
    (folder / "text.txt").write_text(tiny_text())
    given = ["prune", str(folder / "source"), "--output", str(folder / "out")]
    given += ["--calibration", str(folder / "text.txt"), "--sparsity", "2:4"]
    given += ["--n-sequences", "4", "--sequence-length", "12", "--threads", "1"]
    return [*given, *more]


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        scores: Tensor = model(random_tokens(2, 10)).logits
    return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_and_verify(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    source = save_checkpoint(tmp_path / "source", model)
    assert run(command(tmp_path, "--method", "wanda+least-squares")) == 0
    out = tmp_path / "out"
    capsys.readouterr()
    assert run(["verify", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ok  ") == len(printed.splitlines()) == 9
    text = [tiny_text()]
    report = prune_model(source, "wanda+least-squares", "2:4", calibration=text, **SETTINGS)
    with torch.no_grad():
        expected = report.model(random_tokens(2, 10)).logits
    assert torch.equal(logits(out), expected)
    assert not torch.equal(logits(out), logits(source))


def test_transposed_weights_keep_their_storage(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("gpt2"))
    assert run(command(tmp_path, "--method", "magnitude")) == 0
    out = tmp_path / "out"
    before, after = load_file(source / SHARD), load_file(out / SHARD)
    masks = read_masks(out)
    assert sorted(Manifest.read(out).transposed) == sorted(masks)
    assert len(masks) == 8
    for name, mask in masks.items():
        assert mask.shape == after[name].shape == before[name].shape
        assert torch.equal(after[name], torch.where(mask, before[name], 0))
        assert NM(2, 4).accepts(mask.T.contiguous())


def test_pattern_along_the_wrong_dimension_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks of a transposed layer that were computed as if it were stored (out, in)."""
    save_checkpoint(tmp_path / "source", tiny_model("gpt2"))
    assert run(command(tmp_path, "--method", "magnitude")) == 0
    path = tmp_path / "out" / "layerwise" / "manifest.json"
    text = path.read_text()
    start = text.index('"transposed"')
    path.write_text(text[:start] + '"transposed": []' + text[text.index("]", start) + 1 :])
    assert run(["verify", str(tmp_path / "out")]) == 3
    failed = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")
    ]
    assert failed == ["FAIL  every mask satisfies the pattern 2:4"]


def test_damage_to_a_transposed_weight_is_noticed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", tiny_model("gpt2"))
    assert run(command(tmp_path, "--method", "magnitude")) == 0
    edit_shard(
        tmp_path / "out" / SHARD,
        lambda tensors: tensors["transformer.h.0.mlp.c_fc.weight"].fill_(1),
    )
    assert run(["verify", str(tmp_path / "out")]) == 3


def test_run_on_transposed_weights_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "source", tiny_model("gpt2"))
    arguments = command(tmp_path, "--method", "sparsegpt")
    assert run(arguments) == 0
    expected = load_file(tmp_path / "out" / SHARD)
    (tmp_path / "out").rename(tmp_path / "undisturbed")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("layerwise.run.pipeline.journal.Journal.write_layers", stop)
        assert run(arguments) == 130
    blocks = tmp_path / "out.partial" / "layerwise" / "blocks"
    assert len(list(blocks.iterdir())) == 1
    assert run(arguments) == 0
    found = load_file(tmp_path / "out" / SHARD)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_attention_of_a_mixture_of_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts are fused while loading and stay dense, with the bytes of the source."""
    source = save_checkpoint(tmp_path / "source", mixture_of_experts())
    arguments = command(tmp_path, "--method", "magnitude")
    capsys.readouterr()
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "experts.gate_up_proj (a parameter of shape" in error
    assert not (tmp_path / "out.partial").exists()
    assert run([*arguments, "--ignore", "re:.*experts.*"]) == 0
    log = capsys.readouterr().err
    assert "no adapter is declared for this Qwen3MoeForCausalLM" in log
    assert "the 8 layers to prune hold 3" in log
    assert run(["verify", str(tmp_path / "out")]) == 0
    before, after = load_file(source / SHARD), load_file(tmp_path / "out" / SHARD)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 8
    assert all("self_attn" in name for name in changed)

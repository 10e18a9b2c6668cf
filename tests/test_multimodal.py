"""The text part of a multimodal model is pruned; vision and projector keep their bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, BartConfig, BertConfig, T5Config

import layerwise
from layerwise.errors import DataError, UnsupportedModelError
from layerwise.grams.collect_grams import collect_grams
from layerwise.grams.solve_grams import solve_grams
from layerwise.planning import plan as plan_module
from layerwise.planning.plan import plan_run
from layerwise.recovery.retrain import retrain_model
from layerwise.run.data.perplexity import perplexity
from layerwise.run.outputs.verify import verify
from layerwise.run.prune import prune_model
from tests.support.models import SHARD, edit_shard, random_tokens
from tests.support.multimodal import IMAGE, save_multimodal
from tests.support.planning import FixedRates

TOKENS = random_tokens(4, 12).clamp(max=IMAGE - 3)
SETTINGS: dict[str, Any] = {"sparsity": 0.5, "n_sequences": 4, "sequence_length": 12}
TEXT_PARTS = {  # type -> beginning of the stored names, as on the hub
    "llava": "language_model.model.layers.",
    "gemma3": "language_model.model.layers.",
    "qwen2_vl": "model.layers.",
    "gemma4": "model.language_model.layers.",
}


def pruned(source: Path, out: Path, **more: Any) -> Any:
    settings = {**SETTINGS, "calibration": TOKENS, "output_dir": out, **more}
    return prune_model(source, "wanda", **settings)


def changed_tensors(one: Path, other: Path) -> list[str]:
    """Names of the stored tensors that differ; both folders must have the same names."""
    return changed(load_file(one / SHARD), load_file(other / SHARD))


def changed(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return sorted(name for name in one if not torch.equal(one[name], other[name]))


@pytest.mark.parametrize("kind", TEXT_PARTS)
def test_only_the_text_part_changes(kind: str, tmp_path: Path) -> None:
    source, out = save_multimodal(tmp_path / "m", kind), tmp_path / "out"
    report = pruned(source, out)
    names = changed_tensors(source, out)
    assert len(names) == len(report.records)
    assert all(name.startswith(TEXT_PARTS[kind]) for name in names)
    after = load_file(out / SHARD)
    assert all(float((after[name] == 0).float().mean()) >= 0.5 for name in names)
    assert any("vis" in name for name in after)
    assert [check for check in verify(out) if not check.holds] == []
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_a_plan_lists_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "quick_machine", FixedRates)
    source = save_multimodal(tmp_path / "m", kind)
    plan = plan_run(source, "wanda", **SETTINGS, device="cpu")
    planned = {name for g in plan.groups if g.status == "pruned" for name in g.members}
    assert plan.refusal is None
    assert plan.streamed
    assert planned == set(pruned(source, tmp_path / "out").masks)


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_its_own_class_opens_the_result(kind: str, tmp_path: Path) -> None:
    source, out = save_multimodal(tmp_path / "m", kind), tmp_path / "out"
    report = pruned(source, out)
    loaded: Any = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    opened, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    dense = AutoModelForImageTextToText.from_pretrained(source).state_dict()
    assert changed(dense, opened.state_dict()) == sorted(report.masks)
    for name, mask in report.masks.items():
        assert name.startswith("model.language_model.layers.")
        assert not opened.get_parameter(name)[~mask].any()
    again = layerwise.load(out)
    assert type(again) is type(opened)
    assert perplexity(again, TOKENS.flatten(), sequence_length=12) > 1


def test_grams_workers_and_retraining_know_them(tmp_path: Path) -> None:
    source, out = save_multimodal(tmp_path / "m", "gemma3"), tmp_path / "out"
    pruned(source, out, error_correction="none")
    collect: dict[str, Any] = {
        "calibration": TOKENS,
        "n_sequences": 4,
        "sequence_length": 12,
    }
    collect_grams(source, tmp_path / "grams", **collect)
    solve_grams(
        tmp_path / "grams", "wanda", 0.5, model=source, output_dir=tmp_path / "solved"
    )
    assert changed_tensors(out, tmp_path / "solved") == []
    retrain_model(out, output_dir=tmp_path / "r", steps=1, batch_size=1, **collect)
    names = changed_tensors(out, tmp_path / "r")
    assert names
    assert all(name.startswith(TEXT_PARTS["gemma3"]) for name in names)
    assert [check for check in verify(tmp_path / "r") if not check.holds] == []


def test_only_infinite_limits_are_allowed(tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "m", "gemma4")
    stored = load_file(source / SHARD)
    limits = [name for name in stored if name.endswith(("_min", "_max"))]
    assert all(bool(torch.isinf(stored[name])) for name in limits)
    layerwise.load(source)

    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[limits[0]] = torch.tensor(torch.nan)

    edit_shard(source / SHARD, damage)
    with pytest.raises(DataError, match="holds nan"):
        layerwise.load(source)
    with pytest.raises(DataError, match="holds nan"):
        pruned(source, tmp_path / "out")


REFUSED = {
    "mllama": r"layers\.1 not at all on text alone",
    "llama4": r"experts\.gate_up_proj.*leave them dense, ignore ",
    "gemma4 with shared keys": r"layers\.0 writes keys and values .*'shared_kv_states'",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_served_is_refused_before_the_first_pass(
    kind: str, tmp_path: Path
) -> None:
    source = save_multimodal(tmp_path / "m", kind, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match=REFUSED[kind]) as caught:
        pruned(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert "KeyError" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("kind", ["mllama", "gemma4 with shared keys"])
def test_a_plan_refuses_it_in_the_same_words(kind: str, tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "m", kind, dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match=REFUSED[kind]):
        plan_run(source, "wanda", **SETTINGS, device="cpu")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(num_layers=1, d_model=8, d_ff=8), "it has an encoder"),
        (BartConfig(encoder_layers=1, decoder_layers=1, d_model=8), "it has an encoder"),
        (BertConfig(num_hidden_layers=1, hidden_size=12), r"is_decoder is false"),
    ],
    ids=["t5", "bart", "bert"],
)
def test_encoders_are_refused(config: Any, reason: str, tmp_path: Path) -> None:
    source = save_multimodal(tmp_path / "m", "llava")
    config.save_pretrained(source)
    with pytest.raises(UnsupportedModelError, match=f"not a causal language.*{reason}"):
        layerwise.load(source)

"""Stored tensors without a place in the model are an error, unless stock ignores them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config

from layerwise.errors import DataError
from layerwise.grams.collect_grams import collect_grams
from layerwise.planning import plan as plan_module
from layerwise.planning.plan import plan_run
from layerwise.recovery.retrain import retrain_model
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model, open_model
from layerwise.run.outputs.verify import verify
from layerwise.run.prune import prune_model
from tests.support.checkpoints import edit_json
from tests.support.models import SHARD, edit_shard, random_tokens
from tests.support.multimodal import TEXT
from tests.support.planning import FixedRates, saved

TOKENS = random_tokens(4, 12)
SIZE: dict[str, Any] = {"n_sequences": 4, "sequence_length": 12}
Edit = Callable[[dict[str, Tensor]], None]


def pruned(source: Path, out: Path, **more: Any) -> Any:
    arguments = {"sparsity": 0.5, "calibration": TOKENS, "output_dir": out, **SIZE, **more}
    return prune_model(source, "wanda", **arguments)


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "quick_machine", FixedRates)


def biases(*linears: str) -> Edit:
    """Add a bias to some linears of every block."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name, weight in list(tensors.items()):
            if name.removesuffix(".weight").endswith(linears):
                tensors[name.replace(".weight", ".bias")] = torch.ones(len(weight))

    return edit


def norms(tensors: dict[str, Tensor]) -> None:
    for block in range(2):
        for head in ("q", "k"):
            name = f"model.layers.{block}.self_attn.{head}_layernorm"
            tensors |= {f"{name}.{own}": torch.ones(4) for own in ("weight", "bias")}


def extra(name: str) -> Edit:
    return lambda tensors: tensors.update({name: torch.ones(2, 2)})


BIAS = r"layers\.0\.self_attn\.k_proj\.bias.*"
WITHOUT_PLACE: dict[str, tuple[str, Edit, str]] = {
    "biases of attention": (
        "llama",
        biases("q_proj", "k_proj", "v_proj", "o_proj"),
        BIAS + r"and 5 more; set attention_bias to true there, or remove",
    ),
    "biases of the mlp": (
        "llama",
        biases("gate_proj", "up_proj", "down_proj"),
        r"down_proj\.bias.* set mlp_bias to true there, or remove",
    ),
    "all biases": ("llama", biases("_proj"), "set attention_bias and mlp_bias to true"),
    "some of the biases of a flag": (
        "llama",
        biases("q_proj", "k_proj", "v_proj"),
        BIAS
        + r"attention_bias to true there, which also asks for .*\.0\.self_attn\.o_proj",
    ),
    "norms of the heads": ("phi", norms, "k_layernorm.* set qk_layernorm to true"),
    "no flag": ("qwen2", biases("o_proj"), r"o_proj\.bias.*; correct config.json, or"),
    "a head for values": ("opt", extra("v_head.weight"), "v_head.weight; correct"),
    "another name": ("mamba", extra("backbone.layers.0.mixer.B"), r"mixer\.B; correct"),
}


@pytest.mark.parametrize("kind", WITHOUT_PLACE)
def test_tensors_without_a_place_are_named_with_their_flag(
    kind: str, tmp_path: Path
) -> None:
    family, edit, expected = WITHOUT_PLACE[kind]
    source, _ = saved(tmp_path, family)
    edit_shard(source / SHARD, edit)
    with pytest.raises(DataError, match=expected) as caught:
        load_model(Checkpoint.open(source))
    assert "\n" not in str(caught.value)
    for flag in re.findall(r"(\w+_(?:bias|layernorm)) (?:and|to)", str(caught.value)):
        edit_json(source / "config.json", **{flag: True})
    if "also asks" not in expected and "correct" not in expected:
        load_model(Checkpoint.open(source))  # what the message says, helps


def test_every_command_refuses_them(tmp_path: Path) -> None:
    source, out = saved(tmp_path, "llama")[0], tmp_path / "out"
    pruned(source, out)
    for folder in (source, out):
        edit_shard(folder / SHARD, biases("q_proj"))
    streamed = open_model(saved(tmp_path / "other", "llama")[0], streamed=True)
    assert not streamed.in_memory
    commands: list[Callable[[], Any]] = [
        lambda: pruned(source, tmp_path / "new"),
        lambda: pruned(source, None, n_sequences=2),  # type: ignore[arg-type]
        lambda: plan_run(source, "wanda", 0.5, **SIZE),
        lambda: collect_grams(source, tmp_path / "grams", calibration=TOKENS, **SIZE),
        lambda: retrain_model(out, calibration=TOKENS, steps=1, batch_size=1, **SIZE),
    ]
    for command in commands:
        with pytest.raises(DataError, match=r"config\.json has no place"):
            command()
    broken = [check.claim for check in verify(out) if not check.holds]
    assert "stock transformers opens it, every tensor accounted for" in broken


def test_a_missing_tensor_beside_an_unknown_one(tmp_path: Path) -> None:
    """One tensor by another name: a plan refuses it from the headers, as a run does."""
    source, _ = saved(tmp_path, "llama")
    name, other = (f"model.layers.1.self_attn.{n}.weight" for n in ("q_proj", "query"))
    edit_shard(source / SHARD, lambda t: t.update({other: t.pop(name)}))
    messages = set()
    for command in (
        lambda: plan_run(source, "wanda", 0.5, **SIZE),
        lambda: pruned(source, tmp_path / "out"),
        lambda: load_model(Checkpoint.open(source)),
    ):
        with pytest.raises(DataError, match=f"lacks tensors of the model: {name}") as error:
            command()
        messages.add(str(error.value))
    assert len(messages) == 1


# --- tensors that stock does not load and need not ---------------------------------------


class Notes:
    """Listener that keeps the notes of a run."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def on_note(self, text: str) -> None:
        self.said.append(text)

    def on_start(self, n_layers: int) -> None: ...

    def on_layer(self, record: Any) -> None: ...

    def on_finish(self, report: Any) -> None: ...


LEFT_OUT: dict[str, tuple[str, str]] = {
    "old rotary frequencies": ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    "old causal mask": ("gpt2", "transformer.h.0.attn.bias"),
    "layers that predict later tokens": ("qwen2", "mtp.layers.0.mlp.up_proj.weight"),
    "their base model": ("llama", "model.mtp_layers.0.norm.weight"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_tensors_that_stock_ignores_keep_their_bytes(kind: str, tmp_path: Path) -> None:
    family, name = LEFT_OUT[kind]
    source, out = saved(tmp_path, family)[0], tmp_path / "out"
    edit_shard(source / SHARD, extra(name))
    notes = Notes()
    report = pruned(source, out, callbacks=[notes])
    before, after = load_file(source / SHARD), load_file(out / SHARD)
    assert torch.equal(before[name], after[name])
    assert sum(not torch.equal(before[n], after[n]) for n in before) == len(report.masks)
    expected = (
        f"not part of the model that transformers opens, and kept byte for byte: {name}"
    )
    assert expected in notes.said
    assert expected in plan_run(source, "wanda", 0.5, **SIZE).notes
    assert [check for check in verify(out) if not check.holds] == []


def test_a_smaller_model_says_what_it_leaves_out(tmp_path: Path) -> None:
    source, notes = saved(tmp_path, "llama")[0], Notes()
    edit_shard(source / SHARD, extra("mtp.fc.weight"))
    pruned(source, tmp_path / "out", pattern="columns", multiple=1, callbacks=[notes])
    assert any("left out of the smaller model: mtp.fc.weight" in n for n in notes.said)
    assert "mtp.fc.weight" not in load_file(tmp_path / "out" / SHARD)


def another_layer(*, joint: bool) -> Edit:
    """Add a layer after the last one, with the matrix of a layer that looks ahead."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            tensors[name.replace(".1.", ".2.", 1)] = tensors[name].clone()
        if joint:
            tensors["model.layers.2.eh_proj.weight"] = torch.ones(16, 32)

    return edit


def deepseek(folder: Path, edit: Edit) -> Path:
    config = DeepseekV3Config(
        **{**TEXT, "num_key_value_heads": 4, "head_dim": 4},
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        first_k_dense_replace=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    edit_shard(folder / SHARD, edit)
    return folder


def test_a_layer_that_predicts_later_tokens_may_have_any_depth(tmp_path: Path) -> None:
    source = deepseek(tmp_path / "m", another_layer(joint=True))
    edit_json(source / "config.json", num_nextn_predict_layers=0, num_mtp_layers=0)
    before = load_file(source / SHARD)
    pruned(source, tmp_path / "out")
    after = load_file(tmp_path / "out" / SHARD)
    ahead = [name for name in before if name.startswith("model.layers.2.")]
    assert len(ahead) > 10
    assert all(torch.equal(before[name], after[name]) for name in ahead)
    assert not torch.equal(
        *(t["model.layers.1.mlp.up_proj.weight"] for t in (before, after))
    )
    assert [check for check in verify(tmp_path / "out") if not check.holds] == []


@pytest.mark.parametrize("counted", [False, True])
def test_a_layer_like_the_others_must_be_counted(counted: bool, tmp_path: Path) -> None:
    source, _ = saved(tmp_path, "llama")
    edit_shard(source / SHARD, another_layer(joint=False))
    edit_json(source / "config.json", num_nextn_predict_layers=int(counted))
    if counted:
        load_model(Checkpoint.open(source))
    else:
        with pytest.raises(DataError, match=r"layers that config\.json does not count"):
            load_model(Checkpoint.open(source))

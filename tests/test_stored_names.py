"""Checkpoints whose stored names differ from those of the model: renamed, or converted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, NemotronHConfig, conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming

from layerwise.errors import DataError, UnsupportedModelError
from layerwise.grams.collect_grams import collect_grams
from layerwise.planning import plan as plan_module
from layerwise.planning.plan import plan_run
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.accounts import account_of, checkpoint_names
from layerwise.run.models.opening import load_model, open_model
from layerwise.run.outputs.verify import verify
from layerwise.run.prune import prune_model
from tests.support.models import SHARD, edit_shard, random_tokens, tiny_model
from tests.support.multimodal import TEXT, save_multimodal
from tests.support.planning import FixedRates, saved

TOKENS = random_tokens(4, 12)
SIZE: dict[str, Any] = {"n_sequences": 4, "sequence_length": 12}
Edit = Callable[[dict[str, Tensor]], None]


def pruned(source: Path, out: Path, **more: Any) -> Any:
    arguments = {"sparsity": 0.5, "calibration": TOKENS, "output_dir": out, **SIZE, **more}
    return prune_model(source, "wanda", **arguments)


def rename(old: str, new: str) -> Edit:
    """Replace the beginning of stored names."""

    def edit(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(old)]:
            tensors[new + name.removeprefix(old)] = tensors.pop(name)

    return edit


RENAMED = {
    "gpt_neox": "gpt_neox.",  # embed_out is renamed to lm_head
    "gemma3, old names": "language_model.model.layers.",
    "gemma3, new names": "model.language_model.layers.",
    "qwen2_vl, old names": "model.layers.",
}


def save_renamed(folder: Path, kind: str) -> Path:
    family = kind.partition(",")[0]
    if family == "gpt_neox":
        return saved(folder, family)[0]
    save_multimodal(folder, family)
    if "new names" in kind:
        edit_shard(folder / SHARD, rename("language_model.model.", "model.language_model."))
        edit_shard(folder / SHARD, rename("vision_tower.", "model.vision_tower."))
        edit_shard(folder / SHARD, rename("multi_modal", "model.multi_modal"))
    return folder


@pytest.mark.parametrize("kind", RENAMED)
def test_every_parameter_finds_its_tensor(kind: str, tmp_path: Path) -> None:
    source = save_renamed(tmp_path / "m", kind)
    checkpoint = Checkpoint.open(source)
    model, stored = load_model(checkpoint), load_file(source / SHARD)
    names = checkpoint_names(model, checkpoint)
    assert names.keys() == dict(model.named_parameters(remove_duplicate=False)).keys()
    assert set(names.values()) <= stored.keys()
    for parameter, tensor in names.items():
        assert torch.equal(model.get_parameter(parameter), stored[tensor]), parameter
    assert not open_model(source, streamed=True).in_memory


@pytest.mark.parametrize("kind", [kind for kind in RENAMED if kind != "gpt_neox"])
def test_pruned_tensors_keep_their_stored_names(kind: str, tmp_path: Path) -> None:
    source, out = save_renamed(tmp_path / "m", kind), tmp_path / "out"
    report = pruned(source, out)
    before, after = load_file(source / SHARD), load_file(out / SHARD)
    assert before.keys() == after.keys()
    names = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(names) == len(report.masks)
    assert all(name.startswith(RENAMED[kind]) for name in names)
    assert [check for check in verify(out) if not check.holds] == []


def test_a_hybrid_with_renamed_tensors(tmp_path: Path) -> None:
    """Nemotron-H stores `backbone.`, and its experts one by one."""
    config = NemotronHConfig(
        **TEXT,
        layers_block_type=["mamba", "attention", "moe"],
        n_groups=2,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        head_dim=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(UnsupportedModelError, match=r"experts\.up_proj") as caught:
        pruned(tmp_path / "m", tmp_path / "out")
    entries = str(caught.value).rpartition("ignore ")[2].split()
    report = pruned(tmp_path / "m", tmp_path / "out", ignore=entries)
    before, after = (load_file(tmp_path / name / SHARD) for name in ("m", "out"))
    names = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(names) == len(report.masks)
    assert all(name.startswith("backbone.layers.") for name in names)


def test_a_tensor_stored_by_two_names_is_refused(tmp_path: Path) -> None:
    source, _ = saved(tmp_path, "llama")
    other = "layers.1.mlp.up_proj.weight"
    edit_shard(source / SHARD, lambda t: t.update({other: t[f"model.{other}"] + 1}))
    with pytest.raises(DataError, match=f"twice, by two names: model.{other}"):
        load_model(Checkpoint.open(source))


# --- tensors that are converted ----------------------------------------------------------


@pytest.fixture
def converting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers split one stored matrix into two, and rename a third."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the cache
    cache = conversion_mapping._checkpoint_conversion_mapping_cache
    rules = [
        WeightRenaming("mlp.last.weight", "mlp.down_proj.weight"),
        WeightConverter(
            "mlp.gate_up.weight",
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            [Chunk(dim=0)],
        ),
    ]
    monkeypatch.setitem(cache, "LlamaForCausalLM", rules)
    monkeypatch.setattr(plan_module, "quick_machine", FixedRates)


@pytest.fixture
def fused(tmp_path: Path, converting: None) -> Path:
    return saved(tmp_path, "llama")[0]


def test_converted_tensors_are_accounted_for(fused: Path) -> None:
    account = account_of(tiny_model("llama"), Checkpoint.open(fused))
    block = "model.layers.1.mlp"
    assert account.converted[f"{block}.up_proj.weight"] == (f"{block}.gate_up.weight",)
    assert account.names[f"{block}.down_proj.weight"] == f"{block}.last.weight"
    assert account.missing == account.unplaced == frozenset()
    assert not account.is_one_to_one


def test_converted_weights_are_refused_by_name(fused: Path, tmp_path: Path) -> None:
    expected = (
        r"gate_proj \(transformers converts it from model.layers.0.mlp.gate_up.weight"
    )
    with pytest.raises(UnsupportedModelError, match=expected) as caught:
        pruned(fused, tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match=expected):
        collect_grams(fused, tmp_path / "grams", calibration=TOKENS, **SIZE)
    plan = plan_run(fused, "wanda", 0.5, device="cpu", **SIZE)
    assert plan.refusal is not None
    assert str(plan.refusal) == str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
    entries = str(caught.value).rpartition("ignore ")[2].split()
    report = pruned(fused, tmp_path / "out", ignore=["lm_head", *entries])
    assert len(report.masks) == 2 * 5
    before, after = load_file(fused / SHARD), load_file(tmp_path / "out" / SHARD)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == 2 * 5
    assert "model.layers.0.mlp.last.weight" in changed

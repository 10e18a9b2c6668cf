"""Padding: blocks of different widths as one model of the stock format."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import layerwise
from layerwise.adapters import get_coupling
from layerwise.errors import UsageError
from layerwise.run.models.native import save_native
from layerwise.run.models.padding import pad_to_widest
from layerwise.run.models.rewrite import add_bias
from layerwise.run.models.surgery import Cut, shrink, steps_of
from tests.support.cutting import (
    COUPLED,
    EACH,
    PACKAGED,
    distance,
    logits_of,
    model_of,
    names_of,
    random_cuts,
    size_of,
)
from tests.support.tolerances import SURGERY

CASES = [
    *((family, [name]) for family, name in EACH),
    *((family, names_of(family)) for family in (*COUPLED, *PACKAGED)),
]


@pytest.mark.parametrize(("family", "names"), CASES)
def test_padded_models_are_stock_models(
    family: str, names: list[str], tmp_path: Path
) -> None:
    model, adapter = model_of(family)
    dense = size_of(model)
    shrink(model, adapter, random_cuts(model, adapter, names), "native")
    expected, size = logits_of(model), size_of(model)
    pad_to_widest(model, adapter)
    assert distance(logits_of(model), expected) <= SURGERY
    assert size <= size_of(model) <= dense
    assert steps_of(model) == []
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(opened), logits_of(model))


def test_the_widest_block_decides() -> None:
    model, adapter = model_of("llama")
    for index, keep in enumerate((5, 9, 7)):
        cut = Cut(f"model.layers.{index}", "mlp", torch.arange(keep))
        shrink(model, adapter, [cut], "native")
    inside = [block.mlp.down_proj.weight.clone() for block in model.model.layers]
    pad_to_widest(model, adapter)
    assert model.config.intermediate_size == 9
    for block, weight in zip(model.model.layers, inside, strict=True):
        padded = block.mlp.down_proj.weight
        assert torch.equal(padded[:, : weight.shape[1]], weight)
        assert not padded[:, weight.shape[1] :].any()
        assert block.mlp.intermediate_size == block.mlp.gate_proj.out_features == 9


def test_both_stretches_of_mamba_are_padded() -> None:
    model, adapter = model_of("mamba")
    cut = Cut("backbone.layers.0", "inner", torch.arange(5))
    others = [Cut(f"backbone.layers.{i}", "inner", torch.arange(8)) for i in (1, 2)]
    shrink(model, adapter, [cut, *others], "native")
    pad_to_widest(model, adapter)
    weight = model.backbone.layers[0].mixer.in_proj.weight
    zero = (weight == 0).all(dim=1).nonzero()[:, 0].tolist()
    assert zero == [5, 6, 7, 13, 14, 15]
    assert model.backbone.layers[0].mixer.conv1d.groups == 8


def test_heads_are_padded_to_a_number_that_transformers_accepts() -> None:
    """Three heads do not divide a hidden size of sixteen."""
    model, adapter = model_of("llama", num_key_value_heads=4)
    sizes = {"model.layers.0": 3, "model.layers.1": 1, "model.layers.2": 2}
    cuts = [Cut(name, "heads", torch.arange(keep)) for name, keep in sizes.items()]
    shrink(model, adapter, cuts, "native")
    expected = logits_of(model)
    pad_to_widest(model, adapter)
    assert model.config.num_attention_heads == 4
    assert distance(logits_of(model), expected) <= SURGERY


def test_heads_of_opt_get_their_old_number() -> None:
    model, adapter = model_of("opt")
    for name in adapter.blocks_of(model):
        shrink(model, adapter, [Cut(name, "heads", torch.tensor([0, 3]))], "native")
    pad_to_widest(model, adapter)
    heads = get_coupling(adapter, "heads")
    for block in adapter.blocks_of(model).values():
        assert heads.resolve(block).units == 4
        assert block.get_submodule("self_attn").num_heads == 4


def test_a_native_folder_becomes_a_stock_folder(tmp_path: Path) -> None:
    model, adapter = model_of("llama")
    add_bias(model.model.layers[1].self_attn.o_proj, torch.randn(16))
    shrink(model, adapter, random_cuts(model, adapter, names_of("llama")), "native")
    save_native(model, tmp_path / "native")
    loaded = layerwise.load(tmp_path / "native")
    pad_to_widest(loaded, adapter)
    loaded.save_pretrained(tmp_path / "stock")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "stock")
    assert opened.config.attention_bias
    assert distance(logits_of(opened), logits_of(model)) <= SURGERY


def test_biases_without_a_place() -> None:
    model, adapter = model_of("mistral")
    add_bias(model.model.layers[1].mlp.down_proj, torch.randn(16))
    cut = Cut("model.layers.0", "mlp", torch.arange(5))
    shrink(model, adapter, [cut], "native")
    expected = logits_of(model)
    with pytest.raises(UsageError, match=r"no place for a bias of mlp\.down_proj"):
        pad_to_widest(model, adapter)
    assert distance(logits_of(model), expected) <= SURGERY

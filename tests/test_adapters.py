"""Adapters: what a declaration says is what the architecture does."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from layerwise.adapters import ADAPTERS, Adapter, OutputSlice, Stage, get_adapter
from layerwise.adapters.linear import is_linear, matrix
from layerwise.errors import UnsupportedModelError
from layerwise.run.models.architecture import adapter_of
from tests.support.models import (
    FAMILIES,
    blocks_of,
    random_tokens,
    recorded_inputs,
    tiny_model,
)

SUPPORTED = sorted(FAMILIES)
DECLARED = sorted(ADAPTERS)


def test_every_declared_family_has_a_tiny_model() -> None:
    assert DECLARED
    assert set(DECLARED) < set(SUPPORTED)


def described(family: str, layers: int = 2) -> tuple[Any, Adapter, dict[str, nn.Module]]:
    """A model, its adapter, and its blocks by name."""
    model = tiny_model(family, layers=layers)
    adapter = adapter_of(model)
    return model, adapter, adapter.blocks_of(model)


def called(adapter: Adapter, block: str) -> list[Stage]:
    """Stages whose inputs are seen where their linears are called."""
    return [stage for stage in adapter.stages_of(block) if stage.source is None]


@pytest.mark.parametrize("family", SUPPORTED)
def test_linears_of_a_stage_read_the_same_tensor(family: str) -> None:
    model, adapter, blocks = described(family)
    for block_name, block in blocks.items():
        stages = called(adapter, block_name)
        names = [name for stage in stages for name in stage.linears]
        assert names
        with torch.no_grad(), recorded_inputs(block, names) as seen:
            model(random_tokens(2, 9))
        for stage in stages:
            inputs = [seen[name] for name in stage.linears]
            assert all(len(calls) == 1 for calls in inputs)
            assert all(calls[0] is inputs[0][0] for calls in inputs)


@pytest.mark.parametrize("family", SUPPORTED)
def test_different_stages_read_different_tensors(family: str) -> None:
    model, adapter, blocks = described(family)
    block_name, block = next(iter(blocks.items()))
    first = [stage.linears[0] for stage in called(adapter, block_name)]
    with torch.no_grad(), recorded_inputs(block, first) as seen:
        model(random_tokens(2, 9))
    tensors = [calls[0] for calls in seen.values()]
    for i, one in enumerate(tensors):
        assert not any(torch.equal(one, other) for other in tensors[:i])


@pytest.mark.parametrize("family", SUPPORTED)
def test_stages_cover_every_linear_of_a_block_once(family: str) -> None:
    _, adapter, blocks = described(family)
    for block_name, block in blocks.items():
        kinds = (nn.Linear, Conv1D)
        linears = [n for n, m in block.named_modules() if isinstance(m, kinds)]
        assert sorted(adapter.linear_names(block_name)) == sorted(linears)


@pytest.mark.parametrize("family", SUPPORTED)
def test_stages_are_in_the_order_of_the_data_flow(family: str) -> None:
    """What a stage reads does not depend on its own or a later stage."""
    model, adapter, blocks = described(family)
    block_name, block = next(iter(blocks.items()))
    calls: list[str] = []
    stages = called(adapter, block_name)
    for stage in stages:
        for name in stage.linears:
            block.get_submodule(name).register_forward_hook(
                lambda *_, name=name: calls.append(name)
            )
    with torch.no_grad():
        model(random_tokens(1, 9))
    firsts = [min(calls.index(name) for name in stage.linears) for stage in stages]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize("family", SUPPORTED)
def test_blocks_are_all_blocks_in_order(family: str) -> None:
    model, _, found = described(family, layers=3)
    assert [id(block) for block in found.values()] == [id(b) for b in blocks_of(model)]
    assert all(model.get_submodule(name) is block for name, block in found.items())


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [("llame", "close: llama"), ("gpt2", "supported: opt, llama"), ("", "supported: opt")],
)
def test_unknown_model_type(model_type: str, expected: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        get_adapter(model_type)
    message = str(caught.value)
    assert expected in message
    assert repr(model_type) in message
    assert "\n" not in message


def without_blocks(model: Any) -> None:
    del model.model.layers


def with_something_else_for_blocks(model: Any) -> None:
    model.model.layers = nn.Linear(2, 2)


def with_empty_blocks(model: Any) -> None:
    model.model.layers = nn.ModuleList()


def without_a_linear(model: Any) -> None:
    del model.model.layers[1].mlp.up_proj


def with_another_kind_of_linear(model: Any) -> None:
    model.model.layers[1].self_attn.o_proj = nn.Conv1d(16, 16, 1)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_blocks, "'model.layers'"),
        (with_something_else_for_blocks, "'model.layers'"),
        (with_empty_blocks, "'model.layers'"),
        (without_a_linear, "model.layers.1.mlp.up_proj, found nothing"),
        (with_another_kind_of_linear, "model.layers.1.self_attn.o_proj, found Conv1d"),
    ],
)
def test_structure_that_is_not_as_declared(damage: Any, expected: str) -> None:
    model = tiny_model("llama")
    damage(model)
    with pytest.raises(UnsupportedModelError) as caught:
        get_adapter("llama").blocks_of(model)
    message = str(caught.value)
    assert expected in message
    assert "LLaMA adapter" in message
    assert "\n" not in message


def test_linear_names_follow_the_stages() -> None:
    stages = (Stage(("a", "b")), Stage(("c",)))
    adapter = Adapter("x", "layers", stages, by_block={"layers.1": stages[1:]})
    assert adapter.linear_names("layers.0") == ("a", "b", "c")
    assert adapter.linear_names("layers.1") == ("c",)


def test_a_part_of_a_stage_keeps_order_and_source() -> None:
    stage = Stage(("a", "b", "c"), source=OutputSlice("d"))
    assert stage.only({"c", "a"}) == Stage(("a", "c"), source=OutputSlice("d"))


def test_a_source_that_is_not_there() -> None:
    """Versions of transformers that compute it by a function have no such module."""
    model = tiny_model("falcon_mamba")
    del model.backbone.layers[1].mixer.dt_layernorm
    with pytest.raises(UnsupportedModelError) as caught:
        get_adapter("falcon_mamba").blocks_of(model)
    assert "backbone.layers.1.mixer.dt_layernorm, found nothing" in str(caught.value)


def test_matrix_of_a_transposed_layer_is_a_view() -> None:
    layer = Conv1D(3, 2)  # (out, in)
    weight = matrix(layer)
    assert weight.shape == (3, 2)
    weight[2, 0] = 7
    assert layer.weight.tolist()[0][2] == 7


def test_a_weight_that_is_computed_is_no_linear() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))
    assert not is_linear(layer)
    assert is_linear(nn.Linear(2, 3))
    assert is_linear(Conv1D(3, 2))
    assert not is_linear(nn.Conv1d(2, 2, 1))

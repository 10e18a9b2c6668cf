"""Adapters: what a declaration says is what the architecture does."""

from typing import Any

import pytest
import torch
from torch import nn

from layerwise.adapters import ADAPTERS, Adapter, Stage, get_adapter
from layerwise.errors import UnsupportedModelError
from tests.models import FAMILIES, blocks_of, random_tokens, recorded_inputs, tiny_model

SUPPORTED = sorted(ADAPTERS)


def test_every_family_has_a_tiny_model() -> None:
    assert SUPPORTED
    assert set(SUPPORTED) <= set(FAMILIES)


@pytest.mark.parametrize("family", SUPPORTED)
def test_linears_of_a_stage_read_the_same_tensor(family: str) -> None:
    model, adapter = tiny_model(family), get_adapter(family)
    names = adapter.linear_names()
    with torch.no_grad():
        for block in blocks_of(model):
            with recorded_inputs(block, names) as seen:
                model(random_tokens(2, 9))
            for stage in adapter.stages:
                inputs = [seen[name] for name in stage.linears]
                assert all(len(calls) == 1 for calls in inputs)
                assert all(calls[0] is inputs[0][0] for calls in inputs)


@pytest.mark.parametrize("family", SUPPORTED)
def test_different_stages_read_different_tensors(family: str) -> None:
    model, adapter = tiny_model(family), get_adapter(family)
    first = [stage.linears[0] for stage in adapter.stages]
    with torch.no_grad(), recorded_inputs(blocks_of(model)[0], first) as seen:
        model(random_tokens(2, 9))
    tensors = [calls[0] for calls in seen.values()]
    for i, one in enumerate(tensors):
        assert not any(torch.equal(one, other) for other in tensors[:i])


@pytest.mark.parametrize("family", SUPPORTED)
def test_stages_cover_every_linear_of_a_block_once(family: str) -> None:
    model, adapter = tiny_model(family), get_adapter(family)
    for block in adapter.blocks_of(model).values():
        linears = [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]
        assert sorted(adapter.linear_names()) == sorted(linears)


@pytest.mark.parametrize("family", SUPPORTED)
def test_stages_are_in_the_order_of_the_data_flow(family: str) -> None:
    model, adapter = tiny_model(family), get_adapter(family)
    calls: list[str] = []
    block = blocks_of(model)[0]
    for name in adapter.linear_names():
        block.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.append(name)
        )
    with torch.no_grad():
        model(random_tokens(1, 9))
    stage_of = {n: i for i, stage in enumerate(adapter.stages) for n in stage.linears}
    assert len(calls) == len(stage_of)
    order = [stage_of[name] for name in calls]
    assert order == sorted(order)


@pytest.mark.parametrize("family", SUPPORTED)
def test_blocks_are_all_blocks_in_order(family: str) -> None:
    model = tiny_model(family, layers=3)
    found = get_adapter(family).blocks_of(model)
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
    adapter = Adapter("x", "layers", (Stage(("a", "b")), Stage(("c",))))
    assert adapter.linear_names() == ("a", "b", "c")

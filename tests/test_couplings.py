"""Couplings: the declared rows and columns are exactly those to remove together."""

from typing import Any

import pytest
import torch
from torch import nn

from layerwise.adapters import ADAPTERS, Adapter, Coupling, get_adapter, get_coupling
from layerwise.errors import UnsupportedModelError
from tests.support.cutting import (
    COUPLED,
    EACH,
    PACKAGED,
    distance,
    logits_of,
    model_of,
    names_of,
)
from tests.support.models import tiny_model
from tests.support.tolerances import SURGERY

ALL = [*EACH, *((family, name) for family in PACKAGED for name in names_of(family))]


def test_who_declares_what() -> None:
    attention = {"mlp", "heads", "values"}
    declared = {family: set(names_of(family)) for family in ADAPTERS}
    assert declared == {
        **dict.fromkeys(("opt", "llama", "mistral", "qwen2", "qwen3"), attention),
        "mamba": {"inner"},
        "falcon_mamba": {"inner"},
        "mamba2": set(),
    }


@torch.no_grad()
def fill(model: Any, adapter: Adapter, name: str, *, readers: bool, value: Any) -> None:
    """Set every third unit of all blocks, in the consumers or in the producers."""
    coupling = get_coupling(adapter, name)
    for block_name, block in adapter.blocks_of(model).items():
        channels = coupling.resolve(block, block_name)
        kept = torch.tensor([unit for unit in range(channels.units) if unit % 3])
        if channels.units < 3:
            kept = torch.tensor([0])
        for member, (axis, stays) in channels.stays(kept).items():
            if (axis == 1) == readers:
                parameter = block.get_parameter(member)
                leaving = (~stays).nonzero()[:, 0]
                part = parameter.index_select(axis, leaving)
                parameter.index_copy_(axis, leaving, value(part))


@pytest.mark.parametrize(("family", "name"), ALL)
def test_nothing_else_reads_the_channels(family: str, name: str) -> None:
    """With zero columns, what the producers hold does not matter."""
    model, adapter = model_of(family)
    dense = logits_of(model)
    fill(model, adapter, name, readers=True, value=torch.zeros_like)
    before = logits_of(model)
    assert distance(before, dense) > 10 * SURGERY
    fill(model, adapter, name, readers=False, value=torch.randn_like)
    assert distance(logits_of(model), before) <= SURGERY


@pytest.mark.parametrize(("family", "name"), ALL)
def test_nothing_else_makes_the_channels(family: str, name: str) -> None:
    """With rows and biases of zeros, what the consumers hold does not matter."""
    model, adapter = model_of(family)
    fill(model, adapter, name, readers=False, value=torch.zeros_like)
    before = logits_of(model)
    fill(model, adapter, name, readers=True, value=torch.randn_like)
    assert distance(logits_of(model), before) <= SURGERY


@pytest.mark.parametrize(
    ("family", "name", "units", "cost"),
    [
        ("opt", "mlp", 24, 16 + 1 + 16),
        ("opt", "heads", 4, 4 * 4 * 16 + 3 * 4),
        ("opt", "values", 16, 16 + 1 + 16),
        ("llama", "mlp", 24, 3 * 16),
        ("llama", "heads", 2, (8 + 4 + 4 + 8) * 16),
        ("llama", "values", 8, 16 + 2 * 16),
        ("qwen2", "heads", 2, (8 + 4 + 4 + 8) * 16 + 8 + 4 + 4),
        ("qwen2", "values", 8, 16 + 1 + 2 * 16),
        # in 2 x 16, convolution 4 + 1, dt 4 + 1, A 4, D 1, x 4 + 4 + 4, out 16
        ("mamba", "inner", 32, 32 + 5 + 5 + 4 + 1 + 12 + 16),
        ("falcon_mamba", "inner", 32, 75),
    ],
)
def test_units_and_cost(family: str, name: str, units: int, cost: int) -> None:
    model, adapter = model_of(family)
    for block in adapter.blocks_of(model).values():
        channels = get_coupling(adapter, name).resolve(block)
        assert (channels.units, channels.cost) == (units, cost)


def test_columns_of_grouped_values_are_scattered() -> None:
    """Channel 1 of the second head is read by query heads 2 and 3, at their place 1."""
    model, adapter = model_of("llama")
    channels = get_coupling(adapter, "values").resolve(
        adapter.blocks_of(model)["model.layers.0"]
    )
    assert (channels.groups == 5).nonzero()[:, 0].tolist() == [9, 13]
    assert channels.balance is not None
    assert channels.balance.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    pattern = channels.pattern(3)
    pattern.check((16, 16))
    kept = pattern.mask(torch.rand(16, 16))[0]
    assert len(set(channels.groups[kept].tolist())) == 2 * 3


def test_inner_channels_are_twice_in_the_first_projection() -> None:
    model, adapter = model_of("mamba")
    channels = get_coupling(adapter, "inner").resolve(
        adapter.blocks_of(model)["backbone.layers.0"]
    )
    axis, labels = channels.members["mixer.in_proj.weight"]
    assert axis == 0
    assert labels.tolist() == [*range(32), *range(32)]
    assert "mixer.conv1d.bias" in channels.members


@pytest.mark.parametrize("family", COUPLED)
def test_the_main_consumer_is_chosen_on(family: str) -> None:
    model, adapter = model_of(family)
    for coupling in adapter.couplings:
        for block in adapter.blocks_of(model).values():
            channels = coupling.resolve(block)
            weight = adapter.weight(block, coupling.consumers[-1])
            channels.pattern(1).check((weight.shape[0], weight.shape[1]))


def test_unknown_couplings_are_answered_with_the_known() -> None:
    with pytest.raises(
        UnsupportedModelError, match="'inner'; there are mlp, heads, values"
    ):
        get_coupling(get_adapter("llama"), "inner")


@pytest.mark.parametrize("adapter", [get_adapter("mamba2"), Adapter("GPT2LMHead", "h", ())])
def test_families_without_channels_name_those_with(adapter: Adapter) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        get_coupling(adapter, "mlp")
    assert adapter.name in str(caught.value)
    assert "opt, llama, mistral, qwen2, qwen3, mamba, falcon_mamba" in str(caught.value)


def without_a_producer(block: Any) -> None:
    del block.mlp.gate_proj


def with_a_longer_producer(block: Any) -> None:
    block.mlp.gate_proj = nn.Linear(16, 25)


def with_another_producer(block: Any) -> None:
    block.mlp.gate_proj = nn.LayerNorm(24)


def with_another_consumer(block: Any) -> None:
    block.mlp.down_proj = nn.Conv1d(24, 16, 1)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without_a_producer, "at model.layers.1.mlp.gate_proj, found nothing"),
        (
            with_a_longer_producer,
            "25 entries along axis 0, which do not divide into the 24",
        ),
        (with_another_producer, "model.layers.1.mlp.gate_proj, found LayerNorm"),
        (with_another_consumer, "a Linear at model.layers.1.mlp.down_proj, found Conv1d"),
    ],
)
def test_structure_that_is_not_as_declared(damage: Any, expected: str) -> None:
    block = tiny_model("llama").model.layers[1]
    damage(block)
    with pytest.raises(UnsupportedModelError) as caught:
        get_coupling(get_adapter("llama"), "mlp").resolve(block, "model.layers.1")
    assert expected in str(caught.value)


@pytest.mark.parametrize("rows", [6, 10])
@pytest.mark.parametrize("name", ["heads", "values"])
def test_values_that_are_no_whole_heads(name: str, rows: int) -> None:
    block = tiny_model("llama").model.layers[0]
    block.self_attn.v_proj = nn.Linear(16, rows)
    with pytest.raises(UnsupportedModelError, match="do not divide"):
        get_coupling(get_adapter("llama"), name).resolve(block)


def test_a_block_that_does_not_tell_the_size_of_a_head() -> None:
    block = tiny_model("llama").model.layers[0]
    del block.self_attn.head_dim
    with pytest.raises(
        UnsupportedModelError, match=r"no attribute block\.self_attn\.head_dim"
    ):
        get_coupling(get_adapter("llama"), "heads").resolve(block)


def test_a_convolution_must_be_depthwise() -> None:
    block = tiny_model("mamba").backbone.layers[0]
    block.mixer.conv1d = nn.Conv1d(32, 32, 4)
    with pytest.raises(UnsupportedModelError, match=r"conv1d, found Conv1d"):
        get_coupling(get_adapter("mamba"), "inner").resolve(block)


def test_indices_may_be_marked_as_staying() -> None:
    coupling = Coupling("mlp", ("fc2",), ("fc1",))
    block = nn.ModuleDict({"fc1": nn.Linear(3, 4), "fc2": nn.Linear(4, 3)})
    channels = coupling.resolve(block)
    labels = torch.tensor([-1, 0, 1, -1])
    marked = type(channels)("mlp", 2, channels.groups, None, {"fc1.weight": (0, labels)}, 1)
    assert marked.stays(torch.tensor([1]))["fc1.weight"][1].tolist() == [
        True,
        False,
        True,
        True,
    ]

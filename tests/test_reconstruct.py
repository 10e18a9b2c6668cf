"""Units of a block, their dense outputs, and what reconstruction does to a model."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.recovery.units import count_units, dense_output, output_at, units_of
from layerwise.run.activations.streams import capture
from layerwise.run.models.architecture import adapter_of
from tests.support.models import random_tokens, tiny_model
from tests.support.retraining import (
    TOKENS,
    Listener,
    pruned_model,
    retrain,
    values,
    zeros_kept,
)

CPU = torch.device("cpu")
OBJECTIVES = ["block", "parts", "matrix"]
PARTS = {
    "llama": [
        ("self_attn", ("self_attn", "input_layernorm"), "self_attn"),
        ("mlp", ("mlp", "post_attention_layernorm"), "mlp"),
    ],
    "opt": [
        ("self_attn", ("self_attn", "self_attn_layer_norm"), "self_attn"),
        ("fc2", ("fc1", "fc2", "final_layer_norm"), "fc2"),
    ],
    "gpt2": [("attn", ("attn", "ln_1"), "attn"), ("mlp", ("mlp", "ln_2"), "mlp")],
    "mamba": [("mixer", ("mixer", "norm"), "mixer")],
}


def first_block(family: str) -> tuple[Any, Any, Any, Tensor, Any]:
    model = tiny_model(family).requires_grad_(False)
    adapter = adapter_of(model)
    blocks = adapter.blocks_of(model)
    stream = capture(model, list(blocks.values()), [random_tokens(3, 8)])
    name, block = next(iter(blocks.items()))
    return adapter.stages_of(name), block, stream.calls[0][0], stream.hidden[0], model


@pytest.mark.parametrize("family", PARTS)
def test_parts_hold_their_norms(family: str) -> None:
    stages, block, call, hidden, _ = first_block(family)
    units = units_of(block, stages, "parts", call, hidden, CPU)
    assert [(unit.name, unit.modules, unit.exit) for unit in units] == PARTS[family]
    assert count_units(stages, "parts") == len(units)


@pytest.mark.parametrize("family", PARTS)
def test_matrices_are_all_of_them(family: str) -> None:
    stages, block, call, hidden, _ = first_block(family)
    units = units_of(block, stages, "matrix", call, hidden, CPU)
    names = [name for stage in stages for name in stage.linears]
    assert [unit.name for unit in units] == names
    assert count_units(stages, "matrix") == len(names)
    for unit in units:  # what is never called is judged by the block
        assert unit.exit == (None if unit.name == "mixer.dt_proj" else unit.name)


@pytest.mark.parametrize("family", PARTS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_dense_output_differs_from_the_block_in_its_unit_alone(
    family: str, objective: str
) -> None:
    stages, dense, call, hidden, _ = first_block(family)
    block = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(0)
    for stage in stages:
        for name in stage.linears:
            weight = block.get_parameter(f"{name}.weight")
            weight.mul_(torch.rand(weight.shape, generator=generator) > 0.5)
    for unit in units_of(block, stages, objective, call, hidden, CPU):
        mixed = copy.deepcopy(block)
        for name, value in dense.named_parameters():
            if any(name.startswith(m + ".") for m in unit.modules) or not unit.name:
                mixed.get_parameter(name).copy_(value)
        expected = output_at(mixed, unit.exit, call, hidden, CPU)
        before = values(block)
        found = dense_output(block, dense, unit, call, hidden, CPU)
        torch.testing.assert_close(found, expected)
        assert not torch.equal(found, output_at(block, unit.exit, call, hidden, CPU))
        assert all(torch.equal(before[n], p) for n, p in block.named_parameters())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mamba", "mamba2", "gemma"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_errors_fall_and_zeros_stay(family: str, objective: str) -> None:
    model, masks = pruned_model(family, "2:4")
    before = values(model)
    listener = Listener()
    report = retrain(
        model,
        masks=masks,
        dense=tiny_model(family),
        objective=objective,
        learning_rate=0.02,
        steps=15,
        rank=8,
        callbacks=[listener],
    )
    assert zeros_kept(model, masks)
    assert len(listener.steps) == listener.total
    assert listener.records == list(report.records)
    assert all(record.after <= record.before for record in report.records)
    for record in report.records:  # first and last pass over the same three batches
        assert sum(record.losses[-3:]) < sum(record.losses[:3])
    changed = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    assert changed <= set(masks)
    assert bool(changed) == any(record.learning_rate for record in report.records)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_recorded_errors_are_those_of_the_outputs(objective: str) -> None:
    """Of the first unit, by hand on the batch that is held out."""
    model, masks = pruned_model("llama")
    dense, pruned = tiny_model("llama"), copy.deepcopy(model)
    report = retrain(
        model, masks=masks, dense=dense, objective=objective, learning_rate=0.02
    )
    exit_of = {"block": "", "parts": ".self_attn", "matrix": ".self_attn.q_proj"}
    record = report.records[0]
    assert record.name == "model.layers.0" + exit_of[objective]
    wanted, start, end = (_seen(m, record.name) for m in (dense, pruned, model))
    size = float(wanted.norm())
    assert record.before == pytest.approx(float((wanted - start).norm()) / size, rel=0.3)
    if objective == "matrix":  # later matrices do not change it
        held_out = slice(12, 16)
        for value, model_output in ((record.before, start), (record.after, end)):
            lost = (wanted - model_output)[held_out].square().sum()
            energy = wanted.square().sum() / 4
            assert value == pytest.approx(float((lost / energy).sqrt()), rel=1e-4)


@torch.no_grad()
def _seen(model: Any, name: str) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, __, output: seen.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    model(input_ids=TOKENS)
    handle.remove()
    return seen[0]


def test_full_aims_at_the_dense_model_throughout() -> None:
    """Its last block is nearer to the dense outputs than that of `sequential`."""
    distances = {}
    for mode in ("sequential", "full"):
        model, masks = pruned_model("llama", 0.6)
        dense = tiny_model("llama")
        retrain(
            model,
            masks=masks,
            dense=dense,
            parameters="full",
            error_correction=mode,
            steps=40,
            learning_rate=0.01,
        )
        wanted = _seen(dense, "model.layers.1")
        distances[mode] = float((_seen(model, "model.layers.1") - wanted).norm())
    assert distances["full"] < distances["sequential"]


def test_biases_alone_leave_weights_bit_for_bit() -> None:
    model, masks = pruned_model("opt")
    before = values(model)
    retrain(model, masks=masks, dense=tiny_model("opt"), parameters="biases")
    after = values(model)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed
    assert all(name.endswith(".bias") for name in changed)


def test_no_steps_are_the_pruned_model() -> None:
    model, masks = pruned_model("llama")
    before = values(model)
    report = retrain(model, masks=masks, dense=tiny_model("llama"), steps=0)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert all(r.learning_rate is None and r.after == r.before for r in report.records)


def test_dense_model_of_another_kind_is_refused() -> None:
    model, masks = pruned_model("llama")
    with pytest.raises(UsageError, match="the dense model has 3 blocks"):
        retrain(model, masks=masks, dense=tiny_model("llama", layers=3))
    with pytest.raises(UsageError, match="give dense"):
        retrain(model, masks=masks)

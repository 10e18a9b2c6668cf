"""Channels far from zero or far below the others: their moments and errors are true."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.accumulator import MomentAccumulator
from layerwise.patterns import NM, Columns, Unstructured
from layerwise.run.prune import prune_model
from layerwise.shifted import shifted
from tests.support.contract import bits
from tests.support.models import random_tokens, tiny_model
from tests.support.problems import Layer, make_layer
from tests.support.tolerances import FAR_MEANS, MOMENTS, ROUNDING

HALF = Columns(8)


def moved(mean: float, dtype: torch.dtype, drift: float = 0.0) -> Layer:
    """Layer whose inputs have this mean; those of a pruned model have another."""
    layer = make_layer(31, tokens=500, drift=drift)
    seen = layer.pruned_inputs
    seen = None if seen is None else seen + 1.01 * mean
    return Layer(layer.weight, layer.inputs + mean, seen).to(dtype)


def variances(layer: Layer, cuts: int = 1) -> tuple[Tensor, Tensor]:
    """Covariance by the moments of some chunks, and by its definition in float64."""
    accumulator = MomentAccumulator(16)
    for chunk in layer.inputs.T.chunk(cuts):
        accumulator.update(chunk)
    return accumulator.moments().centered().gram, layer.inputs.double().cov(correction=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mean", [100.0, 1e3, 3e3, -1e5])
@pytest.mark.parametrize("cuts", [1, 7])
def test_variance_beside_a_mean(dtype: torch.dtype, mean: float, cuts: int) -> None:
    found, expected = variances(moved(mean, dtype), cuts)
    limit = FAR_MEANS * (1 + mean**2 / 1e6)
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mean", [1e3, 3e3, 1e5])
@pytest.mark.parametrize("drift", [0.0, 0.1])
@pytest.mark.parametrize("solver", ["columns", "flap"])
def test_reported_error_is_true(
    solver: str, drift: float, mean: float, dtype: torch.dtype
) -> None:
    layer = moved(mean, dtype, drift)
    solution = lw.solve(layer.problem(HALF), solver)
    explicit = layer.explicit(solution.weight, solution.bias)
    assert explicit > 0
    assert solution.objective == pytest.approx(
        explicit, rel=FAR_MEANS * (1 + mean**2 / 1e9)
    )
    if solution.certificate is not None:
        assert solution.certificate.bound > 0


def test_constant_channels_are_measured_and_nothing_is_proven() -> None:
    """In float64 a variance of 1e-14 of the second moment is within its rounding."""
    layer = moved(1e7, torch.float64)
    problem = layer.problem(HALF)
    assert problem.centered().moments.vanishes
    solution = lw.solve(problem, "columns")
    explicit = layer.explicit(solution.weight, solution.bias)
    assert 0.5 * explicit < solution.objective < 2 * explicit
    assert solution.certificate is None
    exact = replace(layer, inputs=torch.full_like(layer.inputs, 4.0))
    solution = lw.solve(exact.problem(HALF), "columns")
    assert solution.objective == 0
    assert solution.certificate is not None


@pytest.mark.parametrize(
    "solver", ["wanda", "sparsegpt", "fista", "alps", "swaps", "dsnot"]
)
def test_a_centered_problem_of_constant_inputs_costs_nothing(solver: str) -> None:
    inputs = torch.full((16, 30), 3.7) + torch.arange(16.0)[:, None]
    layer = Layer(make_layer(32).weight.float(), inputs)
    solution = lw.solve(layer.problem(NM(2, 4)).centered(), solver)
    explicit = layer.explicit(solution.weight, solution.bias)
    assert explicit <= ROUNDING * layer.energy
    assert solution.objective <= ROUNDING * layer.energy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1e-24, 1e-36])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_a_channel_far_below_the_others(
    dtype: torch.dtype, factor: float, drift: float
) -> None:
    """Its weights are as much above the others, so that it matters as much."""
    scale = torch.ones(16, dtype=torch.float64)
    scale[3] = 2.0 ** torch.tensor(factor).log2().round().item()
    layer = make_layer(33, drift=drift)
    seen = layer.pruned_inputs
    small = Layer(
        layer.weight / scale,
        layer.inputs * scale[:, None],
        None if seen is None else seen * scale[:, None],
    )
    plain = layer.to(dtype).problem(Unstructured(0.5))
    found = small.to(dtype).problem(Unstructured(0.5))
    for one, other in ((found.energy, plain.energy), (found.drift, plain.drift)):
        torch.testing.assert_close(one, other, rtol=MOMENTS[torch.float32], atol=1e-12)
    unscaled = found.gram / scale / scale[:, None]
    torch.testing.assert_close(unscaled, plain.gram, rtol=MOMENTS[torch.float32], atol=1e-6)
    assert torch.equal(lw.solve(found, "wanda").mask, lw.solve(plain, "wanda").mask)


def test_ordinary_channels_keep_their_bits() -> None:
    layer = make_layer(34, tokens=40).to(torch.float32)
    tokens = layer.inputs.T.contiguous()
    plain = MomentAccumulator(16)
    plain.update(tokens)
    far = tokens.clone()
    far[:, 5] += 3000
    far[:, 6] *= 2.0**-80
    mixed = MomentAccumulator(16)
    mixed.update(far)
    others = [channel for channel in range(16) if channel not in (5, 6)]
    one, other = (a.moments().gram[others][:, others] for a in (plain, mixed))
    scale = tokens.abs().max() / 2048  # far inputs are multiplied in units of 4096
    assert float(scale) < 1
    assert torch.equal(bits(one), bits(other))


def test_a_drift_with_a_mean() -> None:
    """Fewer outputs than half of the inputs, or more: products, or a gram."""
    for rows in (2, 12):
        layer = make_layer(35, rows=rows, tokens=400, drift=0.01)
        assert layer.pruned_inputs is not None
        layer = replace(layer, pruned_inputs=layer.pruned_inputs + 3000).to(torch.float32)
        problem = layer.problem(Unstructured(0.5))
        expected = layer.explicit_rows(layer.weight)
        torch.testing.assert_close(problem.drift, expected, rtol=FAR_MEANS, atol=0)


def test_values_and_offsets_are_the_tokens() -> None:
    tokens = make_layer(36, tokens=30).inputs.T.float()
    tokens[:, 2] += 70
    tokens[:, 3] *= 1e-30
    tokens[:, 4] = -0.1
    found = shifted(tokens.clone())
    assert found.offset is not None
    assert found.unit is not None
    rebuilt = found.values.double() * found.unit + found.offset
    assert torch.equal(rebuilt, tokens.double())
    assert found.offset.nonzero()[:, 0].tolist() == [2, 4]
    half = shifted(tokens.bfloat16())  # no room for differences: the constant channel alone
    assert half.offset is not None
    assert half.offset.nonzero()[:, 0].tolist() == [4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_a_channel_that_decayed(dtype: torch.dtype) -> None:
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[7] *= 1e-24
    report = prune_model(
        model,
        "wanda",
        0.5,
        calibration=random_tokens(4, 16),
        n_sequences=4,
        sequence_length=16,
    )
    assert all(0 < record.relative_error < 1 for record in report.records)

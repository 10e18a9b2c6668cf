"""Scores of columns: each equal to its definition."""

from dataclasses import replace

import pytest
import torch

import layerwise as lw
from layerwise.errors import InvalidProblemError
from layerwise.evaluate import objective_rows
from layerwise.patterns import Columns, FixedMask
from layerwise.problem import LayerProblem
from layerwise.solvers.column.scores import unit_scores
from tests.support.columns import HALF, solver, with_offset
from tests.support.problems import Layer
from tests.support.tolerances import ROUNDING


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_scores_are_their_definitions(drift: float) -> None:
    layer = with_offset(drift=drift)
    weight, seen = layer.weight, layer.seen
    size, spread = weight.abs().sum(dim=0), seen.var(dim=1, correction=0)
    norm = (seen.square().sum(dim=1) / seen.shape[1]).sqrt()
    expected = {
        "magnitude": size,
        "wanda": size * norm,
        "wifn": size * norm / len(weight),
        "ifv": spread,
        "wifv": spread * weight.square().sum(dim=0),
    }
    problem = layer.problem(HALF)
    pairs = torch.arange(16) % 8
    for score, value in expected.items():
        found = unit_scores(problem, torch.arange(16), score)
        torch.testing.assert_close(found, value, msg=score)
        torch.testing.assert_close(
            unit_scores(problem, pairs, score), value[:8] + value[8:], msg=score
        )
        kept = lw.solve(problem, solver(score, "none")).mask[0]
        assert torch.equal(kept, value > value.sort().values[7])


def test_compat_score_wants_the_statistic_of_the_published_code() -> None:
    problem = with_offset().problem(HALF)
    statistic = torch.rand(16, generator=torch.Generator().manual_seed(0))
    moments = replace(problem.moments, fluctuation=statistic)
    posed = LayerProblem.from_moments(problem.weight, moments, pattern=HALF)
    expected = statistic.double() * problem.weight.square().sum(dim=0)
    assert torch.equal(unit_scores(posed, torch.arange(16), "compat"), expected)
    method = solver("compat", "bias")
    assert "fluctuation" in method.requires
    kept = lw.solve(posed, method).mask[0]
    assert torch.equal(kept, expected > expected.sort().values[7])
    with pytest.raises(InvalidProblemError, match="needs the fluctuation"):
        lw.solve(problem, method)


def test_exact_loss_of_a_unit() -> None:
    layer, pairs = with_offset(drift=0.3), torch.arange(16) % 8
    problem = layer.problem(Columns(7, pairs))
    losses = unit_scores(problem, pairs, "obs")
    everything = FixedMask(torch.ones(layer.shape, dtype=torch.bool))
    free = lw.solve(problem.with_pattern(everything), "least-squares").weight
    start = float(objective_rows(problem, free, damped=True).sum())
    for unit in range(8):
        kept = FixedMask((pairs != unit).expand(layer.shape).clone())
        refit = lw.solve(problem.with_pattern(kept), "least-squares").weight
        value = float(objective_rows(problem, refit, damped=True).sum())
        assert start + float(losses[unit]) == pytest.approx(value)
    found = lw.solve(problem, solver("obs", "least-squares")).mask[0]
    assert not found[pairs == losses.argmin()].any()


def test_weighted_fluctuation_does_not_see_the_scale_of_a_channel() -> None:
    layer = with_offset()
    scale = torch.logspace(-3, 3, 16, dtype=torch.float64)
    other = Layer(layer.weight * scale, layer.inputs / scale[:, None])
    for score in ("wifv", "wanda"):
        found, expected = (
            unit_scores(entry.problem(HALF), torch.arange(16), score)
            for entry in (other, layer)
        )
        torch.testing.assert_close(found, expected)


def test_constant_channel_leaves_without_error() -> None:
    layer = with_offset()
    inputs = layer.inputs.clone()
    inputs[11] = -3.7
    layer = replace(layer, inputs=inputs)
    problem = layer.problem(Columns(15))
    assert unit_scores(problem, torch.arange(16), "ifv")[11] == 0
    solution = lw.solve(problem, "flap")
    assert not solution.mask[:, 11].any()
    assert solution.bias is not None
    torch.testing.assert_close(solution.bias, layer.weight[:, 11] * -3.7)
    explicit = layer.explicit(solution.weight, solution.bias)
    assert explicit <= ROUNDING * layer.energy
    assert solution.objective <= ROUNDING * layer.energy


def test_one_channel_leaves_its_fluctuation() -> None:
    layer = with_offset()
    variance = layer.inputs.var(dim=1, correction=0)
    for channel in (0, 7):
        kept = torch.ones(layer.shape, dtype=torch.bool)
        kept[:, channel] = False
        solution = lw.solve(layer.problem(FixedMask(kept)), "flap")
        expected = layer.weight[:, channel].square().sum() * variance[channel]
        assert solution.objective == pytest.approx(float(expected))

"""Error curves: every point equals the answer of the solver for that count alone."""

from itertools import product

import pytest
import torch

import layerwise as lw
from layerwise.errors import InvalidProblemError
from layerwise.patterns import Columns, Unstructured
from layerwise.solvers.column.curve import error_curve
from layerwise.solvers.columns import RESTORATIONS, ColumnPruning
from tests.support.problems import PROBLEMS, Layer, make_layer
from tests.support.tolerances import CLOSED_FORM

WIDTH = 12
STRUCTURES = {
    "columns": Columns(1),
    "uneven": Columns(1, torch.tensor([0, 5, 0, 1, 2, 2, 3, 3, 4, 5, 5, 2])),
    "heads": Columns(1, torch.arange(WIDTH) % 6, torch.tensor([0, 1, 1, 0, 1, 0])),
}
CASES = [
    *product(["magnitude", "wifv", "obs"], RESTORATIONS, ["uneven", "heads"]),
    *product(["greedy"], ["bias", "least-squares", "intercept"], ["columns", "heads"]),
]


def with_offset(drift: float) -> Layer:
    layer = make_layer(5, width=WIDTH, tokens=60, correlation=0.7, drift=drift)
    offset = torch.linspace(-1, 2, WIDTH, dtype=torch.float64)[:, None]
    other = None if layer.pruned_inputs is None else layer.pruned_inputs + 1
    return Layer(layer.weight, layer.inputs + offset, other)


@pytest.mark.parametrize(("score", "restoration", "structure"), CASES)
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_every_point_is_a_solution(
    score: str, restoration: str, structure: str, drift: float
) -> None:
    layer, pattern = with_offset(drift), STRUCTURES[structure]
    solver = ColumnPruning(score=score, restoration=restoration, step=2)  # type: ignore[arg-type]
    curve = error_curve(layer.problem(pattern), solver)
    units = int(pattern.units(WIDTH, torch.device("cpu")).max()) + 1
    count = units if pattern.balance is None else units // 2
    assert curve.shape == (count + 1,)
    slack = CLOSED_FORM[torch.float64] * layer.energy
    for removed in range(count):
        asked = Columns(count - removed, pattern.groups, pattern.balance)
        solution = lw.solve(layer.problem(asked), solver)
        assert float(curve[removed]) == pytest.approx(solution.objective, abs=slack, rel=0)
    nothing = torch.zeros_like(layer.weight)
    measured = layer.centered() if solver.with_bias else layer
    assert float(curve[-1]) == pytest.approx(measured.explicit(nothing), abs=slack, rel=0)


@pytest.mark.parametrize("name", ["drifted-float32", "dead-channel", "few-tokens"])
def test_hard_layers(name: str) -> None:
    layer = PROBLEMS[name]
    curve = error_curve(layer.problem(Columns(1)), ColumnPruning())
    assert curve.dtype == torch.float64
    assert bool((curve >= 0).all())
    solution = lw.solve(layer.problem(Columns(8)), ColumnPruning(score="greedy"))
    slack = CLOSED_FORM[torch.float32] * layer.energy
    assert float(curve[8]) == pytest.approx(solution.objective, abs=slack, rel=0)


def test_scale_of_the_inputs_scales_the_curve() -> None:
    layer = with_offset(0.3)
    curve, larger = (
        error_curve(entry.problem(Columns(1)), ColumnPruning())
        for entry in (layer, layer.scaled(2.0**20))
    )
    assert torch.equal(larger, curve * 2.0**40)


def test_constant_inputs_cost_nothing_with_a_bias() -> None:
    layer = Layer(make_layer(1).weight, torch.ones(16, 4, dtype=torch.float64))
    for score in ("swaps", "obs", "wifv"):
        solver = ColumnPruning(score=score)
        assert not error_curve(layer.problem(Columns(1)), solver).any()


def test_what_has_no_curve() -> None:
    layer = PROBLEMS["plain"]
    with pytest.raises(InvalidProblemError, match=r"needs the pattern Columns, got 0\.5"):
        error_curve(layer.problem(Unstructured(0.5)), ColumnPruning())
    uneven = Columns(1, balance=(torch.arange(16) > 3).long())
    with pytest.raises(InvalidProblemError, match=r"heads of equal size, got \[4, 12\]"):
        error_curve(layer.problem(uneven), ColumnPruning())

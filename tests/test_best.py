"""The composition: never worse than its parts, and more effort is never worse."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import layerwise as lw
from layerwise.errors import MemoryBudgetError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start, Status
from layerwise.solvers.admm import ALPS
from layerwise.solvers.best import Best
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.swaps import Swaps
from tests.support.problems import PROBLEMS, layers, make_layer, patterns
from tests.support.reference import Equations
from tests.support.tolerances import ROUNDING

EFFORTS: tuple[Any, ...] = ("fast", "balanced", "thorough")
PATTERNS = [Unstructured(0.5), Unstructured(0.7), Unstructured(0.5, "layer"), NM(2, 4)]


def value(problem: LayerProblem, solution: Start) -> float:
    return float(objective_rows(problem, solution.weight, damped=True).sum())


def at_alps_mask(problem: LayerProblem) -> Answer:
    mask = ALPS().find(problem)
    weight = torch.where(mask, problem.weight.to(problem.dtype), 0)
    return Answer(weight, mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_more_effort_is_never_worse_and_thorough_helps(pattern: Pattern) -> None:
    total = dict.fromkeys(EFFORTS, 0.0)
    for seed in range(4):
        layer = make_layer(110 + seed, rows=6, width=24, correlation=0.9, drift=0.1)
        problem = layer.problem(pattern)
        values = [value(problem, lw.solve(problem, Best(effort=e))) for e in EFFORTS]
        slack = LeastSquares().tolerance * values[0] + ROUNDING * layer.energy
        assert values[2] <= values[1] + slack
        assert values[1] <= values[0] + slack
        total = {e: total[e] + v for e, v in zip(EFFORTS, values, strict=True)}
    assert total["thorough"] < total["balanced"]


@given(data=st.data())
def test_never_worse_than_its_parts(data: st.DataObject) -> None:
    layer = data.draw(layers())
    pattern = data.draw(patterns(layer))
    problem = layer.problem(pattern)
    alps = lw.solve(problem, "alps")
    swaps = lw.solve(problem, Swaps(candidates=32), initial=at_alps_mask(problem))
    slack = LeastSquares().tolerance * value(problem, alps)
    slack += ROUNDING * (layer.energy + layer.magnitude(alps.weight))
    fast, balanced = (
        value(problem, lw.solve(problem, Best(effort=effort))) for effort in EFFORTS[:2]
    )
    assert fast <= value(problem, alps) + slack
    assert balanced <= fast + slack
    if max(layer.shape) <= 16:  # then no candidate is screened away by either
        assert balanced <= value(problem, swaps) + slack


def test_balanced_makes_the_swaps_of_swaps_if_no_entry_is_left_out() -> None:
    layer = make_layer(120, rows=8, width=48, correlation=0.8, drift=0.1)
    for pattern, candidates in ((Unstructured(0.5), 16), (NM(2, 4), 32)):
        problem = layer.problem(pattern)
        parts = Swaps(candidates=candidates).solve(problem, initial=at_alps_mask(problem))
        solution = Best().solve(problem)
        assert solution.mask is not None
        assert parts.mask is not None
        assert torch.equal(solution.mask, parts.mask)
        assert value(problem, solution) == pytest.approx(value(problem, parts))
        assert solution.stats["swaps"] == parts.stats["swaps"]


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4)], ids=str
)
def test_distance_to_the_best_mask(pattern: Pattern) -> None:
    """On small layers the thorough search finds most optima, and none is missed by much."""
    ratios = []
    for seed in range(8):
        layer = make_layer(130 + seed, rows=2, width=8, correlation=0.9, drift=0.1)
        problem = layer.problem(pattern)
        optimum = Equations(layer).enumerated_minimum(pattern)
        found = value(problem, lw.solve(problem, Best(effort="thorough")))
        ratios.append(found / optimum)
    assert min(ratios) >= 1 - LeastSquares().tolerance
    assert sum(ratio <= 1 + LeastSquares().tolerance for ratio in ratios) >= 6


@pytest.mark.parametrize("effort", EFFORTS)
def test_columns_and_fixed_masks(effort: Any) -> None:
    layer = PROBLEMS["drifted"]
    columns = layer.problem(Columns(7))
    expected = lw.solve(columns, "alps")
    found = lw.solve(columns, Best(effort=effort))
    assert torch.equal(found.weight, expected.weight)
    assert found.certificate is not None
    fixed = layer.problem(FixedMask(Unstructured(0.4).mask(layer.weight)))
    found = lw.solve(fixed, Best(effort=effort))
    assert torch.equal(found.weight, lw.solve(fixed, "least-squares").weight)
    assert found.status is Status.OPTIMAL


def test_thorough_reports_both_searches() -> None:
    layer = make_layer(121, rows=4, width=24, correlation=0.9)
    seen: list[Mapping[str, float]] = []
    problem = layer.problem(Unstructured(0.5))
    solution = lw.solve(problem, Best(effort="thorough"), on_iteration=seen.append)
    assert list(solution.history) == seen
    assert solution.iterations == len(seen)
    assert solution.stats["swaps"] == sum(entry["swaps"] for entry in seen)
    balanced = lw.solve(problem, "best")
    search = Swaps(candidates=32, tabu=300).solve(problem, initial=balanced)
    assert torch.equal(solution.weight, search.weight)
    assert solution.history == balanced.history + search.history
    assert solution.history[: len(balanced.history)] == balanced.history
    assert balanced.certificate is not None
    assert balanced.certificate.kind == "refit"


def test_unknown_effort() -> None:
    with pytest.raises(UsageError, match="effort is one of fast, balanced, thorough, got"):
        Best(effort="maximal")  # type: ignore[arg-type]


def test_memory_budget_reaches_the_parts() -> None:
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    for effort in EFFORTS:
        with pytest.raises(MemoryBudgetError, match="raise it"):
            lw.solve(problem, Best(effort=effort, memory_budget=100))

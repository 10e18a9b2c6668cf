"""Frank-Wolfe: the relaxed problem by its definition, and rounding that never loses."""

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import layerwise as lw
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.frank_wolfe import FrankWolfe, RelaxedMask
from tests.support.problems import PROBLEMS, Layer, layers, make_layer, patterns
from tests.support.tolerances import CLOSED_FORM, GRID, ROUNDING

PATTERNS = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4), NM(1, 4)]
FREE = FrankWolfe(fixed_share=0.0)
LAYER = make_layer(41, rows=8, width=32, tokens=60, drift=0.2, correlation=0.8)
NOTHING = torch.zeros(LAYER.shape, dtype=torch.bool)


def damped_rows(problem: LayerProblem, mask: Tensor) -> Tensor:
    weight = torch.where(mask, problem.weight.double(), 0)
    return objective_rows(problem, weight, damped=True)


def relaxed_objective(layer: Layer, problem: LayerProblem, mask: Tensor) -> Tensor:
    """``||W X - (M * W) Xhat||^2 / tokens`` and the damping, from the inputs."""
    weight = mask * layer.weight
    error = layer.weight @ layer.inputs - weight @ layer.seen
    ridge = problem.ridge * (layer.weight - weight).square().sum()
    return error.square().sum() / layer.inputs.shape[1] + ridge


def some_point(pattern: Pattern) -> Tensor:
    """Average of feasible masks: inside the relaxed set."""
    generator = torch.Generator().manual_seed(5)
    masks = [pattern.mask(torch.rand(LAYER.shape, generator=generator)) for _ in range(4)]
    return torch.stack(masks).double().mean(dim=0)


# -- the relaxed problem ---------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_objective_vertex_and_gap_by_automatic_differentiation(pattern: Pattern) -> None:
    problem = LAYER.problem(pattern)
    point = some_point(pattern).requires_grad_()
    value = relaxed_objective(LAYER, problem, point)
    (gradient,) = torch.autograd.grad(value, point)
    relaxed = RelaxedMask(problem, point.detach(), NOTHING)
    vertex, gaps = relaxed.linear_minimum()
    assert torch.equal(vertex, pattern.mask(-gradient))
    gap = float((gradient * (point.detach() - vertex.double())).sum())
    accuracy = CLOSED_FORM[torch.float64]
    assert float(gaps.sum()) == pytest.approx(gap, rel=accuracy)
    assert float(relaxed.objective().sum()) == pytest.approx(
        float(value.detach()), rel=accuracy
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_exact_step_is_the_best_on_the_segment(pattern: Pattern) -> None:
    problem, point = LAYER.problem(pattern), some_point(pattern)
    relaxed = RelaxedMask(problem, point, NOTHING)
    vertex, gaps = relaxed.linear_minimum()
    relaxed.move(vertex, gaps > 0, None)
    found = float(relaxed.objective().sum())
    assert found == pytest.approx(
        float(relaxed_objective(LAYER, problem, relaxed.values)),
        rel=CLOSED_FORM[torch.float64],
    )
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    together = min(
        float(relaxed_objective(LAYER, problem, point + step * (vertex.double() - point)))
        for step in grid
    )
    assert found <= together * (1 + ROUNDING)
    if pattern == Unstructured(0.7, "layer"):  # one step length, so the grid is near it
        assert found >= together * (1 - 100 * GRID)


def test_published_step_lengths() -> None:
    """2 / (t + 2): the first step goes to the vertex, the second two thirds of the way."""
    pattern = PATTERNS[0]
    problem = LAYER.problem(pattern)
    start = lw.solve(problem, "wanda").mask
    relaxed = RelaxedMask(problem, start, NOTHING)
    first, gaps = relaxed.linear_minimum()
    relaxed.move(first, gaps > 0, 1.0)
    assert torch.equal(relaxed.values, first.double())
    second, _ = relaxed.linear_minimum()
    expected = first.double() / 3 + 2 * second.double() / 3
    value = relaxed_objective(LAYER, problem, expected)
    two = lw.solve(
        problem,
        FrankWolfe(fixed_share=0.0, step="open-loop", max_iterations=3, tolerance=0.0),
    )
    assert two.history[2]["objective"] == pytest.approx(
        float(value), rel=CLOSED_FORM[torch.float64]
    )


def test_exact_steps_never_go_up_and_close_the_gap() -> None:
    problem = LAYER.problem(Unstructured(0.5))
    solution = lw.solve(problem, FrankWolfe(max_iterations=500))
    values = [entry["objective"] for entry in solution.history]
    assert len(values) > 5
    assert all(later <= sooner * (1 + ROUNDING) for sooner, later in pairwise(values))
    assert solution.history[-1]["relative_gap"] == solution.stats["relative_gap"]
    assert solution.stats["relative_gap"] <= FrankWolfe().tolerance
    assert solution.iterations == len(values) < 500


def every_mask(pattern: Pattern, width: int) -> list[Tensor]:
    """All feasible rows."""
    rows = []
    for kept in product([False, True], repeat=width):
        row = torch.tensor([kept])
        if pattern.accepts(row):
            rows.append(row[0])
    return rows


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_gap_bounds_every_mask(pattern: Pattern) -> None:
    """Objective minus gap is below the best mask with dense weights, by enumeration."""
    layer = make_layer(42, rows=4, width=8, tokens=30, drift=0.2, correlation=0.5)
    problem = layer.problem(pattern)
    masks = every_mask(pattern, 8)
    assert len(masks) == (36 if isinstance(pattern, NM) else 70)
    best = torch.stack([damped_rows(problem, m.expand(4, 8)) for m in masks]).amin(dim=0)
    solution = lw.solve(problem, FREE)
    answer = damped_rows(problem, solution.mask)
    assert bool((answer >= best * (1 - ROUNDING)).all())
    for entry in solution.history:
        bound = entry["objective"] * (1 - entry["relative_gap"])
        assert bound <= float(best.sum()) * (1 + ROUNDING)
    assert float(answer.sum()) <= 1.05 * float(best.sum())  # it is near the best one


# -- the answer ------------------------------------------------------------------------


@given(data=st.data())
def test_never_worse_than_its_start(data: st.DataObject) -> None:
    layer = data.draw(layers())
    problem = layer.problem(data.draw(patterns(layer)))
    start = data.draw(st.sampled_from(["magnitude", "wanda", "ria"]))
    share = data.draw(st.sampled_from([0.0, 0.5, 0.9]))
    solver = FrankWolfe(fixed_share=share, max_iterations=15, round_every=4)
    if data.draw(st.booleans(), label="open loop"):
        solver = replace(solver, step="open-loop")
    before = damped_rows(problem, lw.solve(problem, start).mask)
    solution = lw.solve(problem, lw.chain(start, solver))
    after = damped_rows(problem, solution.mask)
    slack = ROUNDING * layer.energy
    assert float(after.sum()) <= float(before.sum()) + slack
    if getattr(problem.pattern, "group", "row") == "row":
        assert bool((after <= before + slack).all())
    assert torch.equal(solution.weight, torch.where(solution.mask, layer.weight, 0))


@pytest.mark.parametrize("solver", [FrankWolfe(), FREE, FrankWolfe(step="open-loop")])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_better_than_its_start_where_inputs_are_correlated(
    solver: FrankWolfe, pattern: Pattern
) -> None:
    problem = LAYER.problem(pattern)
    before, after = (
        float(damped_rows(problem, lw.solve(problem, method).mask).sum())
        for method in ("wanda", solver)
    )
    assert after < before


def test_roundings_on_the_way_count() -> None:
    """The answer is the best of all roundings, so rounding more often helps or is equal."""
    problem = LAYER.problem(Unstructured(0.7))
    often, once = (
        damped_rows(
            problem,
            lw.solve(problem, FrankWolfe(fixed_share=0.0, round_every=every)).mask,
        )
        for every in (1, 100)
    )
    assert bool((often <= once).all())
    assert float(often.sum()) < float(once.sum())


def test_equal_entries_are_rounded_by_wandas_score() -> None:
    problem = LAYER.problem(NM(2, 4))
    relaxed = RelaxedMask(problem, torch.full(LAYER.shape, 0.5), NOTHING)
    assert torch.equal(relaxed.rounded(), lw.solve(problem, "wanda").mask)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_fixed_share_stays_kept(pattern: Pattern) -> None:
    problem = LAYER.problem(pattern)
    start = lw.solve(problem, "wanda").mask
    scores = LAYER.weight.abs() * LAYER.seen.norm(dim=1)
    coupled = pattern == Unstructured(0.7, "layer")
    grouped = torch.where(start, scores, -1).reshape(1 if coupled else len(scores), -1)
    fixed = torch.zeros_like(grouped, dtype=torch.bool)
    for row, kept in enumerate((grouped >= 0).sum(dim=1).tolist()):
        fixed[row, grouped[row].topk(int(0.9 * kept)).indices] = True
    assert lw.solve(problem, FrankWolfe()).mask[fixed.view_as(start)].all()
    assert not lw.solve(problem, FREE).mask[fixed.view_as(start)].all()
    every = lw.solve(problem, FrankWolfe(fixed_share=1.0))
    assert torch.equal(every.mask, start)


def test_masks_that_are_given() -> None:
    layer = PROBLEMS["drifted"]
    mask = torch.rand(layer.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    solution = lw.solve(layer.problem(FixedMask(mask)), "frank-wolfe")
    assert torch.equal(solution.weight, torch.where(mask, layer.weight, 0))
    with pytest.raises(InvalidProblemError, match="does not handle the pattern 8 columns"):
        lw.solve(layer.problem(Columns(8)), "frank-wolfe")


@pytest.mark.parametrize(
    "options",
    [
        {"fixed_share": 1.1},
        {"fixed_share": float("nan")},
        {"tolerance": -1.0},
        {"max_iterations": -1},
        {"round_every": 0},
        {"step": "newton"},
    ],
    ids=str,
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        FrankWolfe(**options)

"""Descent: exact differences in the small problems, passes, free slots, limits."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import MemoryBudgetError
from layerwise.evaluate import objective_rows, residual
from layerwise.patterns import NM, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer
from layerwise.solvers.best import Best
from layerwise.solvers.descent import Descent, Pass
from layerwise.solvers.refit import pivots, undecided
from layerwise.solvers.swaps import Swaps
from tests.support.problems import PROBLEMS, make_layer
from tests.support.reference import Equations
from tests.support.tolerances import CLOSED_FORM, ROUNDING

LAYER = make_layer(91, rows=5, width=24, correlation=0.9, drift=0.2)
ALL, FEW = Pass(99, 0.0), Pass(3, 0.0)


def wanda(problem: LayerProblem) -> Answer:
    found = lw.solve(problem, "wanda")
    return Answer(found.weight, found.mask)


def mask_of(answer: Answer) -> Tensor:
    assert answer.mask is not None
    return answer.mask


def damped(problem: LayerProblem, weight: Tensor) -> Tensor:
    return objective_rows(problem, weight, damped=True)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_small_problems_have_the_differences_of_refits(pattern: Pattern) -> None:
    """Also from weights that are not optimal, and after an exchange."""
    problem = LAYER.problem(pattern)
    start, equations = wanda(problem), Equations(LAYER)
    mask, weight = mask_of(start).clone(), start.weight.double()
    rest = residual(problem, weight)
    bound = problem.factor(torch.float64).inverse_diagonal()
    index = undecided.choose_undecided(pattern, weight, mask, rest, bound, 4)
    assert index.shape == (5, 8)
    assert mask.gather(1, index).tolist() == [[True] * 4 + [False] * 4] * 5
    small = undecided.Reduction(problem).of(weight, mask, rest, index)
    groups = index // pattern.m if isinstance(pattern, NM) else None
    table = pivots.Pivots(
        small.matrix, small.target, 4, torch.ones_like(index, dtype=torch.bool), groups
    )
    slack = CLOSED_FORM[torch.float64] * LAYER.energy
    for _ in range(2):
        before = table.gained
        best = table.best(8)
        table.exchange(best.entering, best.leaving)
        torch.testing.assert_close(before - table.gained, best.change, rtol=0, atol=slack)
        for row in range(5):
            enters = int(index[row, best.entering[row]])
            leaves = int(index[row, best.leaving[row]])
            assert groups is None or enters // 4 == leaves // 4
            assert mask[row, leaves]
            assert not mask[row, enters]
            values = [equations._row(row, kept(mask[row]))]
            mask[row, enters], mask[row, leaves] = True, False
            values.append(equations._row(row, kept(mask[row])))
            change = values[1] - values[0]
            assert float(best.change[row]) == pytest.approx(change, abs=slack)


def kept(row: Tensor) -> tuple[int, ...]:
    return tuple(row.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.9), NM(2, 4)])
def test_passes_fall_and_end_at_the_answer(pattern: Pattern) -> None:
    problem = LAYER.problem(pattern)
    start, slack = wanda(problem), ROUNDING * LAYER.energy
    one = Descent((FEW,)).solve(problem, initial=start)
    more = Descent((FEW, FEW, FEW)).solve(problem, initial=start)
    every = Descent((FEW, ALL)).solve(problem, initial=start)
    values = [entry["objective"] for entry in one.history]
    assert all(b <= a + slack for a, b in pairwise(values))
    assert values[-1] == pytest.approx(float(damped(problem, one.weight).sum()), abs=slack)
    assert damped(problem, more.weight).sum() < damped(problem, one.weight).sum()
    assert more.history[: one.iterations] == one.history
    assert every.iterations > one.iterations
    swaps = lw.solve(problem, Swaps(candidates=99, tolerance=0), initial=every)
    assert swaps.stats["swaps"] == 0  # the last pass left nothing out


def test_more_passes_find_what_one_leaves_out() -> None:
    layer = make_layer(93, rows=4, width=160, correlation=0.9)
    problem = layer.problem(Unstructured(0.5))
    efforts = ("fast", "balanced")
    fast, balanced = (lw.solve(problem, Best(effort=e)) for e in efforts)  # type: ignore[arg-type]
    assert balanced.objective < fast.objective < lw.solve(problem, "alps").objective


def test_rows_that_keep_nothing_or_everything() -> None:
    """Their slots are free, and no entry comes from one."""
    problem = LAYER.problem(Unstructured(0.5, "layer"))
    mask = torch.zeros(LAYER.shape, dtype=torch.bool)
    mask[0], mask[1, :12], mask[2] = True, True, True
    start = Answer(torch.where(mask, problem.weight, 0), mask)
    found = Descent((ALL,)).solve(problem, initial=start)
    assert torch.equal(mask_of(found).sum(dim=1), mask.sum(dim=1))
    assert not torch.equal(mask_of(found)[1], mask[1])


def test_a_row_that_ended_above_its_start_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = LAYER.problem(Unstructured(0.5))
    start = wanda(problem)
    best = pivots.Pivots.best

    def wrong(self: pivots.Pivots, candidates: int) -> pivots.Exchange:
        found = best(self, candidates)
        return found._replace(leaving=self.kept.long().argmax(dim=1))

    monkeypatch.setattr(pivots.Pivots, "best", wrong)
    found = Descent((ALL,), rounds=3).solve(problem, initial=start)
    refitted = lw.solve(problem, "wanda+least-squares")
    limit = damped(problem, refitted.weight) * (1 + 1e-5)
    assert bool((damped(problem, found.weight) <= limit).all())
    assert bool((mask_of(found) == mask_of(start)).all(dim=1).any())


def test_memory_budget() -> None:
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    with pytest.raises(MemoryBudgetError, match="the memory budget is 99; raise it"):
        Descent((ALL,), memory_budget=99).solve(problem, initial=wanda(problem))
    whole = Descent((ALL,)).solve(problem, initial=wanda(problem))
    need = undecided.Reduction.row_bytes(int(mask_of(whole)[0].sum()), 2 * 99)
    parts = Descent((ALL,), memory_budget=2 * need).solve(problem, initial=wanda(problem))
    assert torch.equal(mask_of(whole), mask_of(parts))

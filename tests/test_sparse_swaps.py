"""Swaps with dense weights: the pair formula, descent, local minima by brute force."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import layerwise as lw
from layerwise.errors import MemoryBudgetError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.solution import Status
from layerwise.solvers.sparse_swaps import GAIN, Pairs, SparseSwaps
from tests.support.problems import PROBLEMS, Layer, layers, make_layer, patterns
from tests.support.reference import Equations
from tests.support.tolerances import CLOSED_FORM, ROUNDING

LAYERS = {
    "plain": PROBLEMS["plain"],
    "drifted": PROBLEMS["drifted"],
    "few-tokens": PROBLEMS["few-tokens"],
    "correlated": make_layer(95, rows=4, width=16, correlation=0.9, drift=0.3),
}
PATTERNS = [Unstructured(0.5), Unstructured(0.8, "layer"), NM(2, 4), NM(1, 4)]


def explicit_rows(layer: Layer, mask: Tensor, damping: float) -> Tensor:
    """Damped objective of the dense weights on a mask, by its definition."""
    weight = torch.where(mask, layer.weight.double(), 0)
    return torch.from_numpy(Equations(layer, damping).objective_rows(weight.numpy()))


def all_swaps(layer: Layer, pattern: Pattern, mask: Tensor, damping: float) -> Tensor:
    """Change by every swap, (rows, pruned, restored); infinite where it is impossible."""
    rows, width = layer.shape
    before = explicit_rows(layer, mask, damping)
    change = torch.full((rows, width, width), torch.inf, dtype=torch.float64)
    group = torch.arange(width) // (pattern.m if isinstance(pattern, NM) else width)
    for pruned in range(width):
        for restored in range(width):
            valid = mask[:, pruned] & ~mask[:, restored]
            valid &= group[pruned] == group[restored]
            after = mask.clone()
            after[:, pruned], after[:, restored] = False, True
            difference = explicit_rows(layer, after, damping) - before
            change[valid, pruned, restored] = difference[valid]
    return change


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("damping", [0.01, 0.5])
def test_best_pair_is_that_of_explicit_objectives(
    name: str, pattern: Pattern, damping: float
) -> None:
    layer = LAYERS[name]
    mask = pattern.mask(make_layer(96, *layer.shape).weight)
    problem = layer.problem(FixedMask(mask), damping)
    size = pattern.m if isinstance(pattern, NM) else layer.shape[1]
    best, pruned, restored = Pairs(problem, size).best(mask)
    change = all_swaps(layer, pattern, mask, damping)
    slack = CLOSED_FORM[torch.float64] * layer.energy
    torch.testing.assert_close(best, change.flatten(1).amin(dim=1), rtol=0, atol=slack)
    at = torch.arange(len(mask))[torch.isfinite(best)]
    taken = change[at, pruned[at], restored[at]]
    torch.testing.assert_close(taken, best[at], rtol=0, atol=slack)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("tile", [1, 8 * 16, 8 * 50, 8 * 500, 1 << 20])
def test_tiles_change_nothing(size: int, tile: int) -> None:
    layer = LAYERS["correlated"]
    mask = Unstructured(0.5).mask(make_layer(97, *layer.shape).weight)
    problem = layer.problem(FixedMask(mask))
    whole = Pairs(problem, size).best(mask)
    for one, other in zip(whole, Pairs(problem, size, tile).best(mask), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_no_pair_improves_the_answer(name: str, pattern: Pattern) -> None:
    layer = LAYERS[name]
    problem = layer.problem(pattern)
    solution = lw.solve(problem, "sparse-swaps")
    assert torch.equal(solution.weight, torch.where(solution.mask, layer.weight, 0))
    change = all_swaps(layer, pattern, solution.mask, 0.01).flatten(1).amin(dim=1)
    assert bool((change >= -(GAIN + ROUNDING) * problem.energy).all())
    assert solution.stats["swaps"] > 0


@given(data=st.data())
def test_objective_falls_with_every_round(data: st.DataObject) -> None:
    layer = data.draw(layers())
    problem = layer.problem(data.draw(patterns(layer)))
    start = lw.solve(problem, data.draw(st.sampled_from(["wanda", "magnitude"])))
    before = objective_rows(problem, torch.where(start.mask, layer.weight, 0), damped=True)
    slack = ROUNDING * layer.magnitude(layer.weight)
    for rounds in (0, 1, 2, 100):
        found = lw.solve(problem, SparseSwaps(rounds=rounds), initial=start)
        assert problem.pattern.accepts(found.mask)
        after = objective_rows(problem, found.weight, damped=True)
        assert bool((after <= before + slack).all())
        before = after
        assert rounds or torch.equal(found.mask, start.mask)


def test_memory_budget_changes_the_chunks_and_not_the_mask() -> None:
    problem = LAYERS["correlated"].problem(Unstructured(0.5))
    whole = lw.solve(problem, SparseSwaps())
    row = 12 * 8 * 16
    for rows in (1, 3):
        parts = lw.solve(problem, SparseSwaps(memory_budget=rows * row))
        assert torch.equal(parts.mask, whole.mask)
        assert parts.stats["swaps"] == whole.stats["swaps"]
    with pytest.raises(
        MemoryBudgetError, match=rf"needs {row} bytes.* is {row - 1}; raise"
    ):
        lw.solve(problem, SparseSwaps(memory_budget=row - 1))


def test_fixed_mask_is_left_alone() -> None:
    layer = LAYERS["drifted"]
    mask = Unstructured(0.5).mask(layer.weight)
    solution = lw.solve(layer.problem(FixedMask(mask)), SparseSwaps(memory_budget=1))
    assert solution.status is Status.FEASIBLE
    assert torch.equal(solution.weight, torch.where(mask, layer.weight, 0))


def test_impossible_rounds() -> None:
    with pytest.raises(UsageError, match="rounds must be at least 0, got -1"):
        SparseSwaps(rounds=-1)

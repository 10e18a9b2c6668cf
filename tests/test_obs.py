"""Greedy optimal brain surgeon against a naive version that refits every candidate."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import MemoryBudgetError
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.solution import Status
from layerwise.solvers.obs import OBS
from tests.support.problems import PROBLEMS, Layer, make_layer
from tests.support.reference import Equations

LAYERS = {
    "plain": make_layer(1, rows=3, width=12),
    "drifted": make_layer(2, rows=3, width=12, drift=0.3),
    "correlated": make_layer(3, rows=4, width=8, drift=0.1, correlation=0.9),
    "one-row": make_layer(4, rows=1, width=12),
    "few-tokens": make_layer(5, rows=3, width=12, tokens=6, drift=0.2),
}


def naive(layer: Layer, pattern: Pattern) -> Tensor:
    """Remove the entry whose refitted removal costs least, again and again.

    With one budget for the layer, the entry is the cheapest of all rows.
    """
    equations = Equations(layer)
    rows, width = layer.shape
    mask = torch.ones(rows, width, dtype=torch.bool)
    whole = isinstance(pattern, Unstructured) and pattern.group == "layer"
    for part in [range(rows)] if whole else [range(row, row + 1) for row in range(rows)]:
        for _ in range(count(pattern, len(part), width)):
            costs = {
                (row, column): cost(equations, mask, row, column)
                for row in part
                for column in range(width)
                if mask[row, column] and may_go(pattern, mask[row], column)
            }
            mask[min(costs, key=lambda entry: costs[entry])] = False
    return mask


def count(pattern: Pattern, rows: int, width: int) -> int:
    if isinstance(pattern, NM):
        return width // pattern.m * (pattern.m - pattern.n)
    assert isinstance(pattern, Unstructured)
    return pattern.removed(rows * width)


def may_go(pattern: Pattern, kept: Tensor, column: int) -> bool:
    if not isinstance(pattern, NM):
        return True
    begin = column // pattern.m * pattern.m
    return int(kept[begin : begin + pattern.m].sum()) > pattern.n


def cost(equations: Equations, mask: Tensor, row: int, column: int) -> float:
    before = tuple(mask[row].nonzero()[:, 0].tolist())
    after = tuple(index for index in before if index != column)
    return equations._row(row, after) - equations._row(row, before)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(0.5),
        Unstructured(0.9),
        Unstructured(0.5, "layer"),
        Unstructured(0.95, "layer"),
        NM(2, 4),
        NM(1, 4),
        NM(3, 4),
        NM(4, 4),
        NM(1, 2),
    ],
    ids=str,
)
def test_against_naive_refits(name: str, pattern: Pattern) -> None:
    layer = LAYERS[name]
    solution = lw.solve(layer.problem(pattern), OBS())
    assert torch.equal(solution.mask, naive(layer, pattern))
    assert solution.certificate is not None
    assert solution.status is Status.FEASIBLE


def test_paths_are_nested() -> None:
    layer = make_layer(6, rows=4, width=40, correlation=0.8, drift=0.1)
    masks = [
        lw.solve(layer.problem(Unstructured(percent / 100)), "obs").mask
        for percent in (10, 30, 50, 70, 90)
    ]
    for more, fewer in pairwise(masks):
        assert bool((more | ~fewer).all())


def test_rows_of_one_budget_may_lose_everything() -> None:
    layer = make_layer(7, rows=4, width=8)
    weight = layer.weight.clone()
    weight[1] *= 1e-6
    problem = Layer(weight, layer.inputs).problem(Unstructured(0.5, "layer"))
    mask = lw.solve(problem, "obs").mask
    assert not mask[1].any()
    assert int(mask.sum()) == 16


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "layer"), NM(2, 4)], ids=str)
def test_memory_budget_changes_the_chunks_and_not_the_mask(pattern: Pattern) -> None:
    problem = make_layer(8, rows=7, width=16, drift=0.1).problem(pattern)
    whole = lw.solve(problem, OBS())
    parts = lw.solve(problem, OBS(memory_budget=2 * 4 * 8 * 16**2))
    assert torch.equal(parts.mask, whole.mask)
    with pytest.raises(MemoryBudgetError, match="memory budget is 8191; raise it"):
        lw.solve(problem, OBS(memory_budget=4 * 8 * 16**2 - 1))


def test_fixed_mask_is_refitted() -> None:
    layer = PROBLEMS["drifted"]
    problem = layer.problem(FixedMask(Unstructured(0.4).mask(layer.weight)))
    solution = lw.solve(problem, "obs")
    assert solution.status is Status.OPTIMAL
    assert torch.equal(solution.weight, lw.solve(problem, "least-squares").weight)


@pytest.mark.parametrize("condition", [1e8, 1e12, 1e15])
def test_grams_that_are_nearly_singular(condition: float) -> None:
    layer = make_layer(9, rows=6, width=48, tokens=200, condition=condition)
    for pattern in (Unstructured(0.9), Unstructured(0.9, "layer"), NM(1, 4)):
        problem = layer.problem(pattern, damping=0.0)
        assert pattern.accepts(lw.solve(problem, "obs").mask)

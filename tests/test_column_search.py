"""Column supports and the searches on them: every figure against refits from scratch."""

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.patterns import Columns
from layerwise.problem import LayerProblem
from layerwise.solvers.column.search import exchange_until_none_helps, removal_path
from layerwise.solvers.column.support import ColumnSupport
from layerwise.solvers.columns import ColumnPruning
from tests.support.problems import PROBLEMS, Layer, make_layer
from tests.support.reference import Equations
from tests.support.tolerances import (
    CLOSED_FORM,
    COLUMN_EXCHANGE,
    COLUMNS_NEAR_BEST,
    LONG_WALK,
    ROUNDING,
)

WIDTH = 10
UNITS = {
    "columns": torch.arange(WIDTH),
    "pairs": torch.arange(WIDTH) % 5,
    "uneven": torch.tensor([0, 3, 0, 1, 2, 2, 3, 2, 4, 5]),
}
LAYERS = {
    "plain": make_layer(1, rows=5, width=WIDTH, tokens=60, correlation=0.8),
    "drifted": make_layer(2, rows=5, width=WIDTH, tokens=60, correlation=0.8, drift=0.3),
    "few-tokens": make_layer(3, rows=5, width=WIDTH, tokens=6, drift=0.2),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
every_units = pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)


def posed(layer: Layer, units: Tensor, keep: int = 1) -> LayerProblem:
    return layer.problem(Columns(keep, units))


def minimum(layer: Layer, kept: Tensor) -> float:
    """Damped objective with the best weights on some columns, by another factorization."""
    equations = Equations(layer)
    mask = kept.expand(layer.shape)
    return float(equations.objective_rows(equations.least_squares(mask)).sum())


def after(layer: Layer, units: Tensor, kept: Tensor) -> float:
    return minimum(layer, kept[units])


def close(layer: Layer, value: float) -> object:
    return pytest.approx(value, abs=CLOSED_FORM[torch.float64] * layer.energy, rel=0)


def flipped(kept: Tensor, *units: int) -> Tensor:
    result = kept.clone()
    result[list(units)] ^= True
    return result


@every_layer
@every_units
def test_every_change_is_that_of_a_refit(layer: Layer, units: Tensor) -> None:
    support = ColumnSupport(posed(layer, units), units)
    assert support.objective == close(layer, minimum(layer, units >= 0))
    for moved in ([1], [0, 3], [1], [2, 4], [0]):
        before, kept = support.objective, support.kept
        change = support.flip(torch.tensor(moved))
        assert torch.equal(support.kept, flipped(kept, *moved))
        assert support.objective == close(layer, after(layer, units, support.kept))
        assert change == pytest.approx(support.objective - before)
        for unit, value in enumerate(support.changes().tolist()):
            other = after(layer, units, flipped(support.kept, unit))
            assert support.objective + value == close(layer, other)


@every_layer
@every_units
def test_every_exchange_is_that_of_a_refit(layer: Layer, units: Tensor) -> None:
    support = ColumnSupport(posed(layer, units), units)
    support.restart(flipped(support.kept, 0, 3))
    heads = torch.zeros_like(support.kept, dtype=torch.long)
    found = support.exchanges(torch.tensor([0, 3]), heads)
    assert sorted(found.entering.tolist()) == [0, 3]
    assert found.change.tolist() == sorted(found.change.tolist())
    kept = support.kept.nonzero()[:, 0].tolist()
    for entering, leaving, change in zip(
        found.entering.tolist(), found.leaving.tolist(), found.change.tolist(), strict=True
    ):
        values = {
            unit: after(layer, units, flipped(support.kept, entering, unit))
            for unit in kept
        }
        assert support.objective + change == close(layer, min(values.values()))
        assert support.objective + change == close(layer, values[leaving])


def test_exchanges_stay_in_their_head() -> None:
    layer = LAYERS["plain"]
    support = ColumnSupport(posed(layer, UNITS["columns"]), UNITS["columns"])
    support.restart(flipped(support.kept, 0, 3, 7))
    heads = torch.arange(WIDTH) // 5
    found = support.exchanges(torch.tensor([0, 3, 7]), heads)
    assert torch.equal(heads[found.entering], heads[found.leaving])


def test_a_long_walk_ends_where_a_restart_does() -> None:
    """Rounding of many updates is wiped out before it adds up."""
    layer = PROBLEMS["condition-1e8"]
    units = torch.arange(layer.shape[1])
    problem = layer.problem(Columns(1, units), damping=1e-8)
    support, fresh = ColumnSupport(problem, units), ColumnSupport(problem, units)
    generator = torch.Generator().manual_seed(0)
    support.restart(units < 8)
    for _ in range(201):
        entering, leaving = (
            state.nonzero()[:, 0][torch.randint(8, (1,), generator=generator)]
            for state in (~support.kept, support.kept)
        )
        support.flip(entering)
        support.flip(leaving)
    fresh.restart(support.kept)
    slack = CLOSED_FORM[torch.float64] * layer.energy
    assert support.objective == pytest.approx(fresh.objective, abs=slack, rel=0)
    torch.testing.assert_close(
        support.changes(), fresh.changes(), rtol=LONG_WALK, atol=slack
    )


@every_layer
@every_units
def test_greedy_takes_the_cheapest_unit_every_time(layer: Layer, units: Tensor) -> None:
    support = ColumnSupport(posed(layer, units), units)
    heads = torch.zeros_like(support.kept, dtype=torch.long)
    order = removal_path(support, heads, torch.tensor([4]), step=1).tolist()
    kept = torch.ones_like(support.kept)
    for unit in order:
        values = {
            other: after(layer, units, flipped(kept, other))
            for other in kept.nonzero()[:, 0].tolist()
        }
        assert values[unit] == close(layer, min(values.values()))
        kept = flipped(kept, unit)
    assert torch.equal(support.kept, kept)


@pytest.mark.parametrize("step", [1, 2, 7])
def test_greedy_empties_all_heads_alike(step: int) -> None:
    layer, units = LAYERS["drifted"], UNITS["columns"]
    support = ColumnSupport(posed(layer, units), units)
    heads = torch.tensor([0, 1, 1, 0, 1, 0, 1, 1, 0, 0])
    order = removal_path(support, heads, torch.tensor([3, 3]), step)
    assert sorted(heads[order].view(3, 2).flatten().tolist()) == [0, 0, 0, 1, 1, 1]
    assert all(set(pair) == {0, 1} for pair in heads[order].view(3, 2).tolist())
    assert len(set(order.tolist())) == 6


def test_several_at_once_leave_by_their_costs_alone() -> None:
    layer, units = LAYERS["plain"], UNITS["columns"]
    support = ColumnSupport(posed(layer, units), units)
    cheapest = support.changes().argsort()[:4]
    heads = torch.zeros(WIDTH, dtype=torch.long)
    order = removal_path(support, heads, torch.tensor([4]), step=4)
    assert torch.equal(order, cheapest)


@every_layer
@pytest.mark.parametrize("step", [1, 3])
def test_exchanges_end_where_no_pair_helps(layer: Layer, step: int) -> None:
    units = UNITS["columns"]
    support = ColumnSupport(posed(layer, units), units)
    support.restart(torch.arange(WIDTH) < 5)  # a bad start
    heads = torch.zeros(WIDTH, dtype=torch.long)
    values = [support.objective]
    for entry in exchange_until_none_helps(support, heads, step, 100, 0.0):
        assert entry["objective"] == support.objective
        values.append(support.objective)
    assert len(values) > 1
    assert values == sorted(values, reverse=True)
    assert int(support.kept.sum()) == 5
    removed, kept = (~support.kept).nonzero()[:, 0], support.kept.nonzero()[:, 0]
    best = min(
        after(layer, units, flipped(support.kept, *pair))
        for pair in product(removed.tolist(), kept.tolist())
    )
    assert best >= support.objective * (1 - COLUMN_EXCHANGE) - ROUNDING * layer.energy


def test_rounds_are_an_upper_bound() -> None:
    layer, units = LAYERS["plain"], UNITS["columns"]
    support = ColumnSupport(posed(layer, units), units)
    support.restart(torch.arange(WIDTH) < 5)
    heads = torch.zeros(WIDTH, dtype=torch.long)
    assert len(list(exchange_until_none_helps(support, heads, 1, 1, 0.0))) == 1
    assert list(exchange_until_none_helps(support, heads, 1, 0, 0.0)) == []


# -- against the best set --------------------------------------------------------------


def best_set(layer: Layer, pattern: Columns) -> float:
    """Damped minimum over all sets of units that the pattern allows."""
    units = pattern.units(layer.shape[1], layer.weight.device)
    heads = pattern.heads(int(units.max()) + 1, units.device).tolist()
    members = [[u for u, other in enumerate(heads) if other == head] for head in set(heads)]
    choices = [list(combinations(of_head, pattern.keep)) for of_head in members]
    values = []
    for choice in product(*choices):
        kept = torch.zeros(len(heads), dtype=torch.bool)
        kept[[unit for part in choice for unit in part]] = True
        values.append(after(layer, units, kept))
    return min(values)


SMALL = {
    "columns": Columns(5),
    "pairs": Columns(2, UNITS["pairs"]),
    "uneven": Columns(3, UNITS["uneven"]),
    "heads": Columns(2, balance=torch.arange(WIDTH) // 5),
}


def found_and_best(pattern: Columns, layer: Layer) -> tuple[float, float, float]:
    values = [
        minimum(layer, lw.solve(layer.problem(pattern), solver).mask[0])
        for solver in (
            ColumnPruning(score="greedy", restoration="least-squares"),
            ColumnPruning(score="swaps", restoration="least-squares"),
        )
    ]
    return values[0], values[1], best_set(layer, pattern)


@pytest.mark.parametrize("pattern", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_searches_against_enumeration(pattern: Columns, drift: float) -> None:
    ratios = []
    for seed in range(6):
        layer = make_layer(
            seed, rows=5, width=WIDTH, tokens=60, correlation=0.8, drift=drift
        )
        greedy, swaps, best = found_and_best(pattern, layer)
        slack = ROUNDING * layer.energy
        assert best <= swaps + slack
        assert swaps <= greedy + slack
        ratios.append(swaps / best)
    assert sum(ratios) / len(ratios) <= COLUMNS_NEAR_BEST

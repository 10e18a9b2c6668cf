"""Allocation: the optimum by enumeration and by HiGHS, exact budgets, clear refusals."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import block_diag
from scipy.optimize import linprog
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.run.channels.allocate import Allocation, Curve, allocate
from tests.support.tolerances import ALLOCATION, ALLOCATION_PRICE

COSTS = (3.0, 1.0, 2.0)


def random_curves(
    seed: int,
    units: Sequence[int] = (3, 4, 5),
    *,
    shape: str = "any",
    costs: Sequence[float] = COSTS,
) -> list[Curve]:
    """Curves of one kind each, unless their costs agree."""
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for index, (k, cost) in enumerate(zip(units, costs, strict=True)):
        steps = torch.rand(k, generator=generator, dtype=torch.float64)
        if shape == "convex":
            steps = steps.sort().values
        if shape == "any":
            steps -= 0.2  # some steps lower the error
        errors = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
        curves.append(Curve(f"layer {index}", f"kind of {cost:g}", errors, cost))
    return curves


def best_by_enumeration(
    curves: Sequence[Curve], budget: float, largest_step: float
) -> float:
    """Least error with a cost in [budget, budget + largest step)."""
    best = math.inf
    for counts in itertools.product(*(range(curve.units) for curve in curves)):
        cost = sum(n * curve.cost for n, curve in zip(counts, curves, strict=True))
        if budget - ALLOCATION <= cost < budget - ALLOCATION + largest_step:
            pairs = zip(counts, curves, strict=True)
            best = min(best, sum(float(curve.errors[n]) for n, curve in pairs))
    return best


def error_of(curves: Sequence[Curve], found: Allocation) -> float:
    return sum(float(curve.errors[found.removed[curve.name]]) for curve in curves)


def cost_of(curves: Sequence[Curve], found: Allocation) -> float:
    return sum(found.removed[curve.name] * curve.cost for curve in curves)


def check(curves: Sequence[Curve], budget: float, found: Allocation) -> None:
    """Everything that holds for every allocation."""
    assert list(found.removed) == [curve.name for curve in curves]
    assert all(0 <= found.removed[curve.name] < curve.units for curve in curves)
    assert found.cost == pytest.approx(cost_of(curves, found), rel=ALLOCATION)
    assert found.error == pytest.approx(error_of(curves, found), rel=ALLOCATION)
    assert found.cost >= budget - ALLOCATION * sum(c.units * c.cost for c in curves)
    assert found.cost < budget + max(curve.cost for curve in curves)
    assert found.price >= 0


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31),
    share=st.integers(0, 996).map(lambda n: n / 997),
    shape=st.sampled_from(["any", "monotone", "convex"]),
    costs=st.sampled_from([COSTS, (1.0, 1.0, 1.0), (512.0, 3.0, 3.0), (0.7, 1.1, 1.9)]),
)
def test_no_choice_is_better(
    seed: int, share: float, shape: str, costs: Sequence[float]
) -> None:
    curves = random_curves(seed, shape=shape, costs=costs)
    budget = share * sum((curve.units - 1) * curve.cost for curve in curves)
    found = allocate(curves, budget)
    check(curves, budget, found)
    expected = best_by_enumeration(curves, budget, max(costs))
    assert found.gap == 0
    assert found.error == pytest.approx(expected, rel=ALLOCATION, abs=ALLOCATION)


def relaxation(curves: Sequence[Curve], budget: float) -> tuple[float, float]:
    """Optimum and marginal of the linear relaxation, by HiGHS."""
    counts = [torch.arange(curve.units) for curve in curves]
    errors = torch.cat([torch.as_tensor(curve.errors)[:-1] for curve in curves])
    costs = torch.cat([n * c.cost for n, c in zip(counts, curves, strict=True)])
    one_each = block_diag(*(np.ones((1, curve.units)) for curve in curves))
    answer = linprog(
        errors.numpy(),
        A_ub=-costs[None].numpy(),
        b_ub=[-budget],
        A_eq=one_each,
        b_eq=np.ones(len(curves)),
        method="highs",
    )
    return answer.fun, -float(answer.ineqlin.marginals[0])


@pytest.mark.parametrize("shape", ["any", "monotone", "convex"])
@pytest.mark.parametrize("seed", range(4))
def test_price_is_the_slope_of_the_relaxed_optimum(seed: int, shape: str) -> None:
    curves = random_curves(seed, (8, 9, 7), shape=shape)
    budget, step = 20.3, 1e-3
    found = allocate(curves, budget)
    below, _ = relaxation(curves, budget - step)
    above, marginal = relaxation(curves, budget + step)
    slope = (above - below) / (2 * step)
    assert found.price > 0
    assert found.price == pytest.approx(slope, rel=ALLOCATION_PRICE)
    assert found.price == pytest.approx(marginal, rel=ALLOCATION_PRICE)


def test_a_budget_that_costs_nothing_has_no_price() -> None:
    curves = [Curve("a", "x", [0, 0, 0, 1], 1.0), Curve("b", "x", [0, 1, 2, 3], 1.0)]
    found = allocate(curves, 2)
    assert found.removed == {"a": 2, "b": 0}
    assert (found.price, found.error, found.gap) == (0, 0, 0)


def test_nothing_is_removed_for_nothing() -> None:
    """Zero errors do not mean that units are removed beyond the budget."""
    curves = [Curve("a", "x", [0] * 9, 1.0), Curve("b", "y", [0] * 5, 3.0)]
    assert allocate(curves, 0).removed == {"a": 0, "b": 0}
    for budget in range(1, 17):
        found = allocate(curves, budget)
        check(curves, budget, found)
        assert all(
            found.cost - curve.cost < budget
            for curve in curves
            if found.removed[curve.name]
        )


def test_a_wall_behind_a_dip_is_not_climbed() -> None:
    """Convex hulls jump over walls, counts must not land on them."""
    wall = [0.0, 9.0, 9.0, 1.0, 20.0]
    curves = [Curve("a", "x", wall, 1.0), Curve("b", "x", [0, 0.5, 1.5, 3.0, 4.0], 1.0)]
    assert [allocate(curves, b).removed["a"] for b in range(1, 7)] == [0, 0, 3, 3, 3, 3]


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_errors_of_any_magnitude(scale: float) -> None:
    curves = random_curves(5, shape="monotone")
    scaled = [
        Curve(c.name, c.kind, torch.as_tensor(c.errors) * scale, c.cost) for c in curves
    ]
    expected, found = allocate(curves, 9), allocate(scaled, 9)
    assert found.removed == expected.removed
    assert found.price == pytest.approx(expected.price * scale, rel=ALLOCATION)


def test_small_errors_count_beside_huge_ones() -> None:
    """The huge curve is left alone, and the choice among the small ones is the best."""
    small = [
        Curve(c.name, c.kind, torch.as_tensor(c.errors) * 1e-12, c.cost)
        for c in random_curves(6, shape="monotone")
    ]
    huge = Curve("huge", "wall", torch.linspace(0, 1e12, 6, dtype=torch.float64), 5.0)
    found = allocate([huge, *small], 9)
    assert found.removed["huge"] == 0
    assert found.error == pytest.approx(best_by_enumeration(small, 9, 5.0), rel=ALLOCATION)
    assert allocate([huge, *small], 25).removed["huge"] > 0


# --- ties, multiples ------------------------------------------------------------------


def test_tied_kinds_share_one_count() -> None:
    generator = torch.Generator().manual_seed(7)

    def errors(k: int) -> Tensor:
        return torch.rand(k, generator=generator, dtype=torch.float64).cumsum(0)

    curves = [Curve(f"mlp {i}", "mlp", errors(7), 3.0) for i in range(3)]
    curves += [Curve(f"heads {i}", "heads", errors(5), 16.0) for i in range(3)]
    budget = 75.0
    found = allocate(curves, budget, tie="kind")
    pairs = {(found.removed[f"mlp {i}"], found.removed[f"heads {i}"]) for i in range(3)}
    assert len(pairs) == 1
    best = min(
        sum(float(c.errors[m if c.kind == "mlp" else h]) for c in curves)
        for m, h in itertools.product(range(6), range(4))
        if budget <= 9 * m + 48 * h < budget + 48
    )
    assert found.error == pytest.approx(best, rel=ALLOCATION)
    assert allocate(curves, budget).error < found.error


def test_tied_kinds_need_equal_widths() -> None:
    curves = [Curve("a", "mlp", [0, 1, 2], 1.0), Curve("b", "mlp", [0, 1], 1.0)]
    with pytest.raises(UsageError, match="b has 1 units and a has 2"):
        allocate(curves, 1, tie="kind")


@pytest.mark.parametrize("multiple", [4, {"mlp": 4}])
def test_what_stays_is_a_multiple(multiple: int | dict[str, int]) -> None:
    """Or everything: 13 units stay 13, or become 12, 8 or 4."""
    line = torch.arange(14, dtype=torch.float64)
    curves = [Curve("a", "mlp", line.square(), 1.0), Curve("b", "heads", 1e3 * line, 30.0)]
    curves = curves[: 1 + isinstance(multiple, dict)]
    kept = [13 - allocate(curves, b, multiple=multiple).removed["a"] for b in (0, 1, 2, 9)]
    assert kept == [13, 12, 8, 4]
    if isinstance(multiple, dict):  # the other kind goes unit by unit
        assert allocate(curves, 30, multiple=multiple).removed == {"a": 0, "b": 1}


def test_at_least_one_unit_or_one_multiple_stays() -> None:
    curve = Curve("a", "mlp", [0.0] * 11, 1.0)
    assert allocate([curve], 9).removed == {"a": 9}
    assert allocate([curve], 6, multiple=4).removed == {"a": 6}
    with pytest.raises(UsageError, match=r"of 9\.5 is out of reach: at most 9 of 10 can"):
        allocate([curve], 9.5)
    with pytest.raises(
        UsageError, match="of 7 is out of reach: at most 6 of 10 can be removed"
    ):
        allocate([curve], 7, multiple=4)


# --- size -----------------------------------------------------------------------------


def test_a_fraction_of_the_whole_is_met_exactly() -> None:
    """0.2 times a total is not a binary number: rounding must not cost a unit."""
    curves = [Curve(f"{i}", "mlp", [0, 1, 2, 3, 4, 5], 0.1) for i in range(7)]
    for tenths in range(8):
        budget = tenths / 10 * sum(c.units * c.cost for c in curves)
        assert sum(allocate(curves, budget).removed.values()) == math.ceil(tenths * 3.5)


def test_a_sum_that_rounds_below_the_budget_is_enough() -> None:
    """Eight times 0.1 is 0.7999999999999999."""
    assert sum([0.1] * 8) < 0.8
    curves = [Curve(f"{i}", "mlp", [0, 1, 9], 0.1) for i in range(8)]
    assert set(allocate(curves, 0.8).removed.values()) == {1}


def test_curves_of_a_whole_model() -> None:
    """Thirty-two layers of heads and neurons: proven, and close to the relaxation."""
    generator = torch.Generator().manual_seed(8)
    curves = []
    for i in range(32):
        for kind, k, cost in (("heads", 32, 512.0), ("mlp", 172, 192.0)):
            bend, size = 1 + 2 * torch.rand(2, generator=generator, dtype=torch.float64)
            line = torch.linspace(0, 1, k + 1, dtype=torch.float64)
            curves.append(Curve(f"{kind} {i}", kind, size * line**bend, cost))
    budget = 0.3 * sum(c.units * c.cost for c in curves)
    found = allocate(curves, budget)
    check(curves, budget, found)
    bound, marginal = relaxation(curves, budget)
    assert found.gap == 0
    assert bound <= found.error <= bound + found.price * 192
    assert found.price == pytest.approx(marginal, rel=ALLOCATION_PRICE)


def test_costs_without_common_multiple_are_answered_with_their_gap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layerwise.run.channels.knapsack.MOST_STATES", 2)
    costs = [math.sqrt(2 + i) for i in range(8)]
    curves = random_curves(9, [9] * 8, shape="monotone", costs=costs)
    found = allocate(curves, 40.1)
    check(curves, 40.1, found)
    bound, _ = relaxation(curves, 40.1)
    assert found.gap > 0
    assert found.error - found.gap <= bound * (1 + ALLOCATION_PRICE)
    monkeypatch.undo()
    best = allocate(curves, 40.1)
    assert best.gap == 0
    assert found.error - found.gap <= best.error <= found.error


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("errors", "cost", "message"),
    [
        ([0.0], 1.0, "a: errors must be a vector .* 0, 1, ... removed units"),
        ([[0.0, 1.0]], 1.0, "a: errors must be a vector"),
        ([0.0, 1.0, math.nan], 1.0, "a: the error of removing 2 units is not finite"),
        ([0.0, 1.0], 0.0, "a: a unit costs 0.0"),
        ([0.0, 1.0], math.inf, "a: a unit costs inf"),
    ],
)
def test_impossible_curves(errors: list[float], cost: float, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Curve("a", "mlp", errors, cost)


def test_impossible_requests() -> None:
    curve = Curve("a", "mlp", [0.0, 1.0, 2.0], 1.0)
    with pytest.raises(UsageError, match="at least one curve"):
        allocate([], 1)
    with pytest.raises(UsageError, match="two curves are called 'a'"):
        allocate([curve, curve], 1)
    for budget in (-1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="finite number >= 0"):
            allocate([curve], budget)
    with pytest.raises(UsageError, match="multiple must be at least 1, got 0 for a"):
        allocate([curve], 1, multiple=0)

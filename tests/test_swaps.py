"""Swaps: exact descent, local minima by brute force, trade between rows, tabu search."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import layerwise as lw
from layerwise.errors import MemoryBudgetError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.refit.supports import Supports
from layerwise.solvers.swaps import SPARE_SLOTS, TABU_ADDED, TABU_REMOVED, Swaps, match
from tests.support.problems import PROBLEMS, Layer, layers, make_layer, patterns
from tests.support.reference import Equations
from tests.support.tolerances import LOCAL_MINIMUM, ROUNDING

WIDE = make_layer(81, rows=6, width=16, correlation=0.9, drift=0.2)
PATTERNS = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(1, 4)]
EXACT = Swaps(candidates=99, tolerance=0)  # nothing screened away, down to rounding


def damped_rows(problem: LayerProblem, weight: Tensor) -> Tensor:
    return objective_rows(problem, weight, damped=True)


def value(problem: LayerProblem, solution: Solution) -> float:
    return float(damped_rows(problem, solution.weight).sum())


def refitted(problem: LayerProblem, mask: Tensor) -> Solution:
    return lw.solve(problem.with_pattern(FixedMask(mask)), "least-squares")


def best_exchange(layer: Layer, pattern: Pattern, mask: Tensor) -> Tensor:
    """Least objective that one swap in each row can reach, by refits of all of them."""
    equations = Equations(layer)
    group = torch.arange(layer.shape[1]) // (pattern.m if isinstance(pattern, NM) else 9999)
    best = torch.full((len(mask),), torch.inf, dtype=torch.float64)
    for row, kept in enumerate(mask):
        for leaves in kept.nonzero()[:, 0].tolist():
            for enters in (~kept).nonzero()[:, 0].tolist():
                if group[leaves] == group[enters]:
                    support = kept.clone()
                    support[leaves], support[enters] = False, True
                    columns = tuple(support.nonzero()[:, 0].tolist())
                    best[row] = min(float(best[row]), equations._row(row, columns))
    return best


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["plain", "wide", "few-tokens"])
def test_no_single_swap_improves(name: str, pattern: Pattern) -> None:
    layer = WIDE if name == "wide" else PROBLEMS[name]
    problem = layer.problem(pattern)
    solution = lw.solve(problem, EXACT)
    rows = damped_rows(problem, solution.weight)
    reachable = best_exchange(layer, pattern, solution.mask)
    assert bool((reachable >= rows - LOCAL_MINIMUM * problem.energy).all())
    wanda = refitted(problem, lw.solve(problem, "wanda").mask)
    assert solution.stats["swaps"] > 0
    assert value(problem, solution) < value(problem, wanda)


def test_tolerance_is_the_improvement_that_is_missed() -> None:
    problem = WIDE.problem(Unstructured(0.5))
    start = lw.solve(problem, "wanda")
    mean = float(damped_rows(problem, refitted(problem, start.mask).weight).mean())
    for tolerance in (0.3, 0.03):
        solution = lw.solve(problem, Swaps(candidates=99, tolerance=tolerance))
        rows = damped_rows(problem, solution.weight)
        reachable = best_exchange(WIDE, problem.pattern, solution.mask)
        slack = LOCAL_MINIMUM * problem.energy
        assert bool((reachable >= rows - tolerance * mean - slack).all())
    lazy = lw.solve(problem, Swaps(tolerance=float("inf")))
    assert torch.equal(lazy.mask, start.mask)


@pytest.mark.parametrize("pattern", [*PATTERNS, Unstructured(0.6, "layer")], ids=str)
@pytest.mark.parametrize("tabu", [0, 20])
def test_history_falls_and_ends_at_the_answer(pattern: Pattern, tabu: int) -> None:
    problem = WIDE.problem(pattern)
    seen: list[Mapping[str, float]] = []
    solution = lw.solve(problem, Swaps(tabu=tabu), on_iteration=seen.append)
    assert list(solution.history) == seen
    objectives = [entry["objective"] for entry in seen]
    slack = ROUNDING * WIDE.energy
    assert len(objectives) > 1
    assert all(b <= a + slack for a, b in pairwise(objectives))
    assert objectives[-1] == pytest.approx(value(problem, solution), abs=slack)
    assert solution.stats["swaps"] == sum(entry["swaps"] for entry in seen)
    assert solution.iterations == len(seen)


@given(data=st.data())
def test_never_worse_than_its_start(data: st.DataObject) -> None:
    layer = data.draw(layers())
    problem = layer.problem(data.draw(patterns(layer)), damping=0.001)
    start = lw.solve(problem, data.draw(st.sampled_from(["magnitude", "sparsegpt"])))
    solver = Swaps(
        rounds=data.draw(st.integers(0, 5), label="rounds"),
        candidates=data.draw(st.sampled_from([1, 3, 99]), label="candidates"),
        tabu=data.draw(st.sampled_from([0, 10]), label="tabu"),
    )
    solution = lw.solve(problem, solver, initial=start)
    assert problem.pattern.accepts(solution.mask)
    before = refitted(problem, start.mask)
    limit = (1 + LeastSquares().tolerance) * damped_rows(problem, before.weight)
    limit = limit + ROUNDING * (problem.energy + layer.magnitude(before.weight))
    rows = damped_rows(problem, solution.weight)
    if getattr(problem.pattern, "group", "row") == "layer":  # rows may pay for others
        rows, limit = rows.sum(), limit.sum()
    assert bool((rows <= limit).all())


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4)], ids=str
)
def test_not_below_the_known_optimum_and_tabu_reaches_it(pattern: Pattern) -> None:
    reached = 0
    for seed in range(6):
        layer = make_layer(820 + seed, rows=3, width=8, correlation=0.9, drift=0.2)
        problem = layer.problem(pattern)
        optimum = Equations(layer).enumerated_minimum(pattern)
        plain = value(problem, lw.solve(problem, Swaps()))
        tabu = value(problem, lw.solve(problem, Swaps(tabu=100)))
        slack = ROUNDING * layer.energy + LeastSquares().tolerance * optimum
        assert optimum - slack <= tabu <= plain + slack
        reached += tabu <= optimum + slack
    assert reached >= 4


def test_tabu_search_leaves_local_minima() -> None:
    better = 0
    for seed in range(4):
        layer = make_layer(830 + seed, rows=6, width=24, correlation=0.9)
        for pattern in (Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4)):
            problem = layer.problem(pattern)
            plain = value(problem, lw.solve(problem, Swaps()))
            tabu = lw.solve(problem, Swaps(tabu=60))
            assert value(problem, tabu) <= plain * (1 + LeastSquares().tolerance)
            assert pattern.accepts(tabu.mask)
            better += value(problem, tabu) < 0.999 * plain
    assert better >= 3


def test_entries_that_moved_stay_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless their move back gives the lowest objective that the row has had."""
    masks: list[Tensor] = []
    objectives: list[Tensor] = []
    exchange = Supports.exchange

    def record(self: Supports, *arguments: Any) -> None:
        if not masks:
            masks.append(self.mask.clone())
            objectives.append(self.objective())
        exchange(self, *arguments)
        masks.append(self.mask.clone())
        objectives.append(self.objective())

    monkeypatch.setattr(Supports, "exchange", record)
    problem = WIDE.problem(Unstructured(0.5))
    lw.solve(problem, Swaps(rounds=0, tabu=40))  # no descent, only the tabu search
    assert len(masks) == 41
    returned = 0
    for step in range(1, 41):
        for row, column in (masks[step] ^ masks[step - 1]).nonzero().tolist():
            now = bool(masks[step][row, column])
            later = [bool(mask[row, column]) != now for mask in masks[step:]]
            if True not in later:
                continue
            gap = later.index(True)
            values = [float(values[row]) for values in objectives[: step + gap + 1]]
            record_low = values[-1] < min(values[:-1])
            hold = TABU_ADDED if now else TABU_REMOVED
            assert record_low or gap > hold[(step - 1) % len(hold)]
            returned += 1
    assert returned > 20


def test_tabu_search_with_fewer_removed_entries_than_candidates() -> None:
    """An entry that is kept must never be taken for one that enters."""
    for seed in range(4):
        layer = make_layer(seed, rows=4, width=16)
        for pattern in (Unstructured(0.1), Unstructured(0.5, "layer"), NM(3, 4)):
            solution = lw.solve(layer.problem(pattern), Swaps(candidates=99, tabu=30))
            assert pattern.accepts(solution.mask)


# -- one budget for the layer ----------------------------------------------------------


def uneven(seed: int) -> Layer:
    """Rows of very different size, so that a budget per row is far from the best."""
    layer = make_layer(seed, rows=6, width=16, correlation=0.8, drift=0.1)
    scale = torch.tensor([8, 1, 1, 0.1, 3, 0.02], dtype=torch.float64)
    return replace(layer, weight=layer.weight * scale[:, None])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_budget_moves_to_the_rows_that_need_it(seed: int, sparsity: float) -> None:
    layer = uneven(seed)
    by_row, by_layer = Unstructured(sparsity), Unstructured(sparsity, "layer")
    even = lw.solve(layer.problem(by_row), EXACT)
    budget = layer.problem(by_layer)
    short = by_layer.removed(even.mask.numel()) - int((~even.mask).sum())
    start = even.mask.clone()
    start[0, start[0].nonzero()[:short, 0]] = False  # floors of rows and layer differ
    before = refitted(budget, start)
    solution = lw.solve(budget, EXACT, initial=before)
    assert by_layer.accepts(solution.mask)
    assert value(budget, solution) < value(budget, before)
    counts = solution.mask.sum(dim=1)
    assert counts[0] > counts[5]
    assert_no_trade_pays(layer, solution, int(start.sum(dim=1).amax()) + SPARE_SLOTS)


def assert_no_trade_pays(layer: Layer, solution: Solution, slots: int) -> None:
    """By refits: no removal in one row costs less than an addition gains in another."""
    problem, mask = layer.problem(Unstructured(0)), solution.mask
    rows = damped_rows(problem, solution.weight)
    equations = Equations(layer)
    costs = torch.full((len(mask),), torch.inf, dtype=torch.float64)
    gains = torch.zeros(len(mask), dtype=torch.float64)
    for row in range(len(mask)):
        for column in range(mask.shape[1]):
            support = mask[row].clone()
            support[column] ^= True
            columns = tuple(support.nonzero()[:, 0].tolist())
            change = equations._row(row, columns) - float(rows[row])
            if mask[row, column]:
                costs[row] = min(float(costs[row]), change)
            elif int(mask[row].sum()) < slots:  # else it cannot win another entry
                gains[row] = max(float(gains[row]), -change)
    advantage = gains[:, None] - costs
    advantage.fill_diagonal_(-torch.inf)
    assert float(advantage.max()) <= LOCAL_MINIMUM * layer.energy


def test_a_row_may_keep_everything_or_nothing() -> None:
    layer = uneven(5)
    weight = layer.weight.clone()
    weight[5] = 0
    layer = replace(layer, weight=weight)
    pattern = Unstructured(0.5, "layer")
    mask = torch.zeros(layer.shape, dtype=torch.bool)
    mask[3], mask[5], mask[1] = True, True, True  # the wrong rows
    problem = layer.problem(pattern)
    solution = lw.solve(problem, EXACT, initial=refitted(problem, mask))
    assert pattern.accepts(solution.mask)
    assert value(problem, solution) < value(problem, refitted(problem, mask)) / 10
    assert solution.mask.sum(dim=1)[5] <= 8


def test_pairs_of_rows() -> None:
    def pairs(costs: list[float], gains: list[float], least: float = 0) -> Any:
        givers, takers = match(
            torch.tensor(costs), torch.tensor(gains), torch.full((len(costs),), least)
        )
        return list(zip(givers.tolist(), takers.tolist(), strict=True))

    inf = float("inf")
    assert pairs([1, 2, 9, 9], [0, 0, 8, 5]) == [(0, 2), (1, 3)]
    assert pairs([1, 2, 9, 9], [0, 0, 8, 2]) == [(0, 2)]
    assert pairs([1, 2, 9, 9], [0, 0, 8, 5], least=4) == [(0, 2)]
    assert pairs([1, 2], [0.5, 1]) == []
    assert pairs([inf, inf], [1, 2]) == []
    assert pairs([1], [5]) == []  # a row does not trade with itself
    # the row that gains most is also the cheapest giver, and no other one is cheap enough
    assert pairs([1, 20, 20], [10, 0, 9]) == [(0, 2)]
    assert pairs([1, 2], [10, 9]) == [(1, 0)]


@pytest.mark.parametrize("rows", [2, 3])
def test_trade_that_touches_every_row(rows: int) -> None:
    """Giver and taker are then all rows, in another order than the inverses."""
    traded = 0
    for seed in range(8):
        layer = uneven(seed).rows(torch.tensor([3, 4, 0])[-rows:])
        problem = layer.problem(Unstructured(0.5, "layer"))
        solution = lw.solve(problem, EXACT)
        assert problem.pattern.accepts(solution.mask)
        traded += len(set(solution.mask.sum(dim=1).tolist())) > 1
        if solution.history:
            final, slack = solution.history[-1]["objective"], ROUNDING * layer.energy
            assert final == pytest.approx(value(problem, solution), abs=slack)
    assert traded >= 4


# -- limits ----------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [*PATTERNS, Unstructured(0.5, "layer")], ids=str)
def test_memory_budget_changes_the_chunks(pattern: Pattern) -> None:
    problem = WIDE.problem(pattern)
    whole = lw.solve(problem, Swaps(tolerance=0, tabu=5))
    for budget in (60_000, 100_000):
        parts = lw.solve(problem, Swaps(tolerance=0, tabu=5, memory_budget=budget))
        assert pattern.accepts(parts.mask)
        if getattr(pattern, "group", "row") == "row":
            assert torch.equal(parts.mask, whole.mask)
            assert torch.equal(parts.weight, whole.weight)


def test_memory_budget_too_small_for_one_row() -> None:
    problem = WIDE.problem(Unstructured(0.5))
    with pytest.raises(MemoryBudgetError, match=r"memory budget is 1000; raise it"):
        lw.solve(problem, Swaps(memory_budget=1000))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": -1}, "rounds must be at least 0, got -1"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"tolerance": -1e-9}, "tolerance must be at least 0, got -1e-09"),
        ({"tolerance": float("nan")}, "tolerance must be at least 0, got nan"),
        ({"tabu": -3}, "tabu must be at least 0, got -3"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Swaps(**options)


def test_no_rounds_are_a_refit_of_the_start() -> None:
    problem = WIDE.problem(Unstructured(0.5))
    wanda = lw.solve(problem, "wanda")
    solution = lw.solve(problem, Swaps(rounds=0))
    assert torch.equal(solution.mask, wanda.mask)
    assert value(problem, solution) == pytest.approx(
        value(problem, refitted(problem, wanda.mask)), rel=LeastSquares().tolerance
    )
    assert solution.history == ()


def test_fixed_mask_is_refitted() -> None:
    mask = Unstructured(0.4).mask(WIDE.weight.abs())
    problem = WIDE.problem(FixedMask(mask))
    solution = lw.solve(problem, Swaps(tabu=5))
    assert solution.status is Status.OPTIMAL
    assert torch.equal(solution.weight, lw.solve(problem, "least-squares").weight)


@pytest.mark.parametrize("solver", ["swaps", "sparse-swaps"])
def test_start_with_a_mask_that_breaks_the_pattern(solver: str) -> None:
    problem = WIDE.problem(Unstructured(0.5))
    for other in (Unstructured(0.2), Unstructured(0.9), Unstructured(0.5, "layer")):
        start = lw.solve(problem.with_pattern(other), "wanda")
        solution = lw.solve(problem, solver, initial=start)
        assert problem.pattern.accepts(solution.mask)
    mask = Unstructured(0.3).mask(WIDE.weight)
    fixed = lw.solve(problem.with_pattern(FixedMask(mask)), solver, initial=start)
    assert torch.equal(fixed.mask, mask)


def test_an_exception_of_the_callback_gets_through() -> None:
    problem = WIDE.problem(Unstructured(0.5))

    def stop(_: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lw.solve(problem, "swaps", on_iteration=stop)
    assert lw.solve(problem, "swaps").status is Status.FEASIBLE


@pytest.mark.parametrize(
    "pattern", [NM(2, 4), Unstructured(0.5), Unstructured(0.5, "layer")]
)
def test_never_worse_than_the_start_where_updates_drift(pattern: Pattern) -> None:
    """Five tokens for 32 inputs: the damped gram is singular up to rounding."""
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(2, 32, generator=generator, dtype=torch.float64)
        scales = torch.empty(32, 1, dtype=torch.float64)
        scales = 10 ** scales.uniform_(-1, 1, generator=generator)
        inputs = torch.randn(32, 5, generator=generator, dtype=torch.float64) * scales
        posed = LayerProblem.from_inputs(weight, inputs, pattern=pattern, damping=0.0)
        start = lw.solve(posed, "alps")
        problem = posed.with_damping(start.stats["damping"])
        least = objective_rows(problem, start.weight, damped=True).sum()
        for method in ("best", "alps+swaps"):
            found = lw.solve(posed, method)
            value = objective_rows(problem, found.weight, damped=True).sum()
            assert value <= least * (1 + 1e-5), (seed, method)
            assert pattern.accepts(found.mask)

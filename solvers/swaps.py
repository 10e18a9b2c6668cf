r"""Swaps: exchange a kept entry for a removed one while that lowers the objective.

Weights are refitted exactly with every swap, so swaps are compared by the exact change of
the objective (:mod:`layerwise.solvers.refit.supports`). The bound ``r_q^2 [G^-1]_qq`` on
the gain of adding an entry q selects candidates. Per row and round, the removed entries
with the largest bounds are compared with all kept ones, and the best pair is swapped if
that lowers the objective. Rows without such a pair are finished.

Two extensions go beyond a local minimum of the rows. With one budget for the layer, a row
gives an entry to another row if the removal costs less than the addition gains there.
And `tabu` steps [2]_ make the best swap even if it raises the objective, forbid the
exchanged entries to change back for some steps, and return the best mask of all steps.

References
----------
.. [1] M. Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale",
   arXiv:2512.10922 (swaps without refits; here :mod:`layerwise.solvers.sparse_swaps`).
.. [2] F. Glover, "Tabu Search - Part I", ORSA Journal on Computing 1989.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.options import check_at_least
from layerwise.solvers.refit.supports import Entries, Supports
from layerwise.solvers.wanda import wanda_mask

SPARE_SLOTS = 8  # entries beyond the longest row, with one budget for the layer
TABU_ADDED = (3, 5, 8, 4, 11, 6)  # steps that an added entry is tabu, in turn
TABU_REMOVED = (2, 1, 3)  # steps that a removed entry is tabu, in turn
PATIENCE = 250  # tabu steps without a better mask after which a row stops
NOISE = 1e-12  # of a row's energy: smaller changes are rounding
WORSE = 1e-6  # largest accepted increase of a row, as a share of its first objective


@dataclass(frozen=True)
class Swaps:
    """Local search on the mask with exact refits; counts never change.

    Cost: O(rows kept^2 candidates) per round, for the rows that still change; memory
    O(kept^2) per row.

    Parameters
    ----------
    rounds
        Largest number of swaps of a row in a descent, and of rounds of trade between rows.
    candidates
        Removed entries of a row that are compared: those with the largest bounds.
    tolerance
        Smallest improvement worth a swap, relative to the mean objective of the rows that
        are worked on together.
    tabu
        Steps of the search beyond the local minimum.
    memory_budget
        Bytes for the rows that are worked on together; only such rows trade entries.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "certified refit, never worse than its start"
    name: str = "swaps"
    rounds: int = 100
    candidates: int = 16
    tolerance: float = 1e-5
    tabu: int = 0
    memory_budget: int = LeastSquares.memory_budget

    def __post_init__(self) -> None:
        check_at_least(self, rounds=0, candidates=1, tolerance=0, tabu=0)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Unstructured and n:m; a fixed mask is only refitted."""
        return isinstance(problem.pattern, Unstructured | NM | FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Refine the mask of `initial`, by default Wanda's."""
        refit = LeastSquares(memory_budget=self.memory_budget)
        if isinstance(problem.pattern, FixedMask):
            return refit.solve(problem, initial=initial)
        problem = problem.with_damping(problem.factor(torch.float64).damping)
        mask = wanda_mask(problem, initial)
        slots = min(int(mask.sum(dim=1).amax()) + _spare(problem.pattern), problem.shape[1])
        chunk = Supports.chunk(slots, self.memory_budget, self.candidates)
        weight = torch.zeros_like(mask, dtype=torch.float64)
        history: list[Mapping[str, float]] = []
        start, begin = mask.clone(), torch.zeros_like(problem.drift)
        every = torch.arange(len(mask), device=mask.device)
        for rows in torch.split(every, chunk):
            search = _Search(self, problem, rows, mask[rows], history, on_iteration)
            begin[rows] = search.first_objective
            search.run()
            mask[rows] = search.supports.mask
            weight[rows] = search.supports.dense(search.all)
        answer = refit.refit(problem, weight, mask)
        reached = objective_rows(problem, answer.weight, damped=True)
        worse = self._worse(problem, reached, begin)
        if bool(worse.any()):  # updates drift if the gram is singular up to rounding
            mask[worse] = start[worse]
            weight = torch.where(mask, problem.weight.double(), 0)
            answer = refit.refit(problem, weight, mask)
        swaps = sum(entry["swaps"] for entry in history)
        return replace(
            answer,
            iterations=len(history),
            history=tuple(history),
            stats={**answer.stats, "swaps": swaps},
        )

    def _worse(self, problem: LayerProblem, reached: Tensor, begin: Tensor) -> Tensor:
        """Rows that must return to their first mask, (out,): single rows, or all."""
        slack = 1 + WORSE
        if _spare(problem.pattern):  # rows have traded entries
            return (reached.sum() > slack * begin.sum()).expand(len(reached))
        return reached > slack * begin + NOISE * problem.energy


def _spare(pattern: Pattern) -> int:
    """Number of free slots, for entries that a row gets from others."""
    shared = isinstance(pattern, Unstructured) and pattern.group == "layer"
    return SPARE_SLOTS if shared else 0


class _Search:
    """Search over some rows of the layer; `supports` is its current state."""

    def __init__(
        self,
        options: Swaps,
        problem: LayerProblem,
        rows: Tensor,
        mask: Tensor,
        history: list[Mapping[str, float]],
        on_iteration: OnIteration | None,
    ) -> None:
        self._options, self._problem, self._rows = options, problem, rows
        self._history, self._on_iteration = history, on_iteration
        self._spare = _spare(problem.pattern)
        self._bound = problem.factor(torch.float64).inverse_diagonal()
        self.all = torch.arange(len(rows), device=rows.device)
        self.supports = Supports(problem, rows, mask, self._spare)
        self._objective = self.supports.objective()
        self.first_objective = self._objective.clone()
        least = options.tolerance * self._objective.mean()
        self._least = torch.maximum(least, NOISE * problem.energy[rows])

    def run(self) -> None:
        """Descend; with `tabu` steps, search beyond the minimum and descend again."""
        self._descend(self.all)
        self._trade()
        if self._options.tabu:
            self._tabu_search()
            self._descend(self.all)
            self._trade()

    def _descend(self, rows: Tensor) -> None:
        """Make improving swaps until no row has one."""
        for _ in range(self._options.rounds):
            entries, change = self._changes(rows)
            best, flat = change.flatten(1).min(dim=1)
            moving = (best < -self._least[rows]).nonzero()[:, 0]
            if len(moving) == 0:
                return
            self._take(rows, entries, moving, flat)
            self._objective[rows[moving]] += best[moving]
            self._report(len(moving))
            rows = rows[moving]

    def _changes(self, rows: Tensor) -> tuple[Entries, Tensor]:
        """Candidates, and the change by every swap; infinite if the pattern forbids it."""
        supports = self.supports
        entries = supports.entries(rows, self._bound, self._options.candidates)
        change = supports.exchanges(rows, entries)
        pattern: Pattern = self._problem.pattern
        if isinstance(pattern, NM):
            groups = supports.index[rows][:, None, :] // pattern.m
            other = groups != (entries.index // pattern.m)[:, :, None]
            change = change.masked_fill(other, torch.inf)
        return entries, change

    def _take(self, rows: Tensor, entries: Entries, moving: Tensor, flat: Tensor) -> None:
        """Carry out the chosen swap of some rows."""
        slots = self.supports.index.shape[1]
        self.supports.exchange(
            rows[moving], entries.of(moving), flat[moving] // slots, flat[moving] % slots
        )

    def _tabu_search(self) -> None:
        """Make the best swap of every row, even uphill; end at the best masks of all steps.

        An exchanged entry is tabu: it must not change back for some steps, unless that
        gives a record, the lowest objective of its row so far.
        """
        supports, rows = self.supports, self.all
        free_at = torch.zeros_like(supports.mask, dtype=torch.long)  # step, (rows, in)
        current, best = self._objective.clone(), self._objective.clone()
        best_mask, record_at = supports.mask.clone(), torch.zeros_like(rows)
        for step in range(self._options.tabu):
            rows = rows[step - record_at[rows] < PATIENCE]
            if len(rows) == 0:
                break
            entries, change = self._changes(rows)
            tabu = torch.nn.functional.pad(free_at[rows] > step, (0, 1))
            leaving = tabu.gather(1, supports.index[rows])[:, None, :]
            entering = tabu.gather(1, entries.index)[:, :, None]
            goal = (best[rows] - self._least[rows] - current[rows])[:, None, None]
            change = change.masked_fill((leaving | entering) & (change >= goal), torch.inf)
            lowest, flat = change.flatten(1).min(dim=1)
            moving = torch.isfinite(lowest).nonzero()[:, 0]
            moved, before = rows[moving], supports.mask[rows[moving]]
            self._take(rows, entries, moving, flat)
            after, times = supports.mask[moved], free_at[moved]
            times[after & ~before] = step + 1 + TABU_ADDED[step % len(TABU_ADDED)]
            times[before & ~after] = step + 1 + TABU_REMOVED[step % len(TABU_REMOVED)]
            free_at[moved] = times
            current[moved] += lowest[moving]
            record = moved[current[moved] < best[moved] - self._least[moved]]
            best[record], record_at[record] = current[record], step
            best_mask[record] = supports.mask[record]
        self.supports = Supports(self._problem, self._rows, best_mask, self._spare)
        self._objective = self.supports.objective()
        self._report(0)

    def _trade(self) -> None:
        """Move entries from rows that lose little to rows that gain more, while it pays."""
        if not self._spare:
            return
        costs, slots = self.supports.removal_costs(self.all).min(dim=1)
        gains = self._largest_gains(self.all)
        for _ in range(self._options.rounds):
            givers, takers = match(costs, gains, self._least)
            if len(givers) == 0:
                return
            entries = self.supports.entries(takers, self._bound, self._options.candidates)
            gained, chosen = entries.gains.max(dim=1)
            self.supports.add(takers, entries, chosen)
            self.supports.remove(givers, slots[givers])
            self._objective[takers] -= gained
            self._objective[givers] += costs[givers]
            self._report(len(givers))
            touched = torch.cat([givers, takers])
            self._descend(touched)
            costs[touched], slots[touched] = self.supports.removal_costs(touched).min(dim=1)
            gains[touched] = self._largest_gains(touched)

    def _largest_gains(self, rows: Tensor) -> Tensor:
        """Gain of the best addition to each row; zero if no slot is free."""
        entries = self.supports.entries(rows, self._bound, self._options.candidates)
        full = (self.supports.index[rows] < self.supports.width).all(dim=1)
        return entries.gains.amax(dim=1).masked_fill(full, 0)

    def _report(self, swaps: int) -> None:
        entry = {"objective": float(self._objective.sum()), "swaps": float(swaps)}
        self._history.append(entry)
        if self._on_iteration is not None:
            self._on_iteration(entry)


def match(
    costs: Tensor,  # (rows,) of the cheapest removal
    gains: Tensor,  # (rows,) of the best addition
    least: Tensor,  # (rows,) of the smallest gain that is worth a trade
) -> tuple[Tensor, Tensor]:  # givers and takers, (pairs,) each
    """Pair the largest gains with the cheapest removals of other rows, while it pays.

    A row takes part in one pair at most, because a trade changes what it offers.
    """
    cost, gain, margin = costs.tolist(), gains.tolist(), least.tolist()
    cheapest = deque(costs.argsort().tolist())
    givers: list[int] = []
    takers: list[int] = []
    used: set[int] = set()
    for taker in (-gains).argsort().tolist():
        if taker in used:
            continue
        while cheapest and cheapest[0] in used:
            cheapest.popleft()
        if not cheapest or gain[taker] <= cost[cheapest[0]]:
            break  # the following rows gain even less
        giver = next((row for row in cheapest if row not in used and row != taker), None)
        if giver is not None and gain[taker] - cost[giver] > margin[taker]:
            givers.append(giver)
            takers.append(taker)
            used.update((giver, taker))
    pairs = torch.tensor([givers, takers], dtype=torch.long, device=costs.device)
    return pairs[0], pairs[1]

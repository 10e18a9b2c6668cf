r"""Descent by exchanges among the undecided entries of every row.

A row is reduced to the entries that are most likely to change
(:mod:`layerwise.solvers.refit.undecided`), and exchanges are made in the small problem
(:mod:`layerwise.solvers.refit.pivots`), each the best one, while the objective falls. Then
weights are refitted, and rows that moved are reduced to other entries, pass by pass, until
a pass gains next to nothing. Where no entry that matters is left out, the local minima are
those of :mod:`layerwise.solvers.swaps`, at a small part of its time and memory.

References
----------
The reduction is our own; :mod:`layerwise.solvers.swaps` names the source of the search.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.errors import MemoryBudgetError
from layerwise.evaluate import objective_rows, residual
from layerwise.patterns import NM, FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import Answer
from layerwise.solver import OnIteration
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.refit.pivots import Pivots
from layerwise.solvers.refit.undecided import Reduction, choose_undecided

CACHED_ROWS = 128  # rows whose tableaus fit the caches of a processor together
ROUGH = 1e-4  # tolerance of the refit between two passes
COMPARED = 16  # entering entries of a row that are compared with all that can leave
WORSE, NOISE = 1e-6, 1e-12  # accepted increase of a row: of its objective, its energy


class Pass(NamedTuple):
    """One reduction of every row.

    Parameters
    ----------
    candidates
        Undecided entries of a row: so many kept and so many removed ones.
    tolerance
        Smallest improvement worth an exchange, relative to the mean objective of a row.
    """

    candidates: int
    tolerance: float


@dataclass(frozen=True)
class Descent:
    """Make the mask of an answer better, and refit it.

    Cost: O(kept^3 / 3) a row and pass for the reduction, O(candidates^2) an exchange;
    memory O(kept^2 + candidates^2) for one row of a chunk.

    Parameters
    ----------
    passes
        The passes, in turn.
    enough
        A pass that gains less than this share of the objective is the last one.
    rounds
        Largest number of exchanges of a row in a pass.
    memory_budget
        Bytes for the rows that are worked on together.
    """

    passes: tuple[Pass, ...]
    enough: float = 0.0
    rounds: int = 100
    memory_budget: int = LeastSquares.memory_budget

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Answer,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Refine the mask of `initial`; no row gets worse than a refit of it."""
        assert initial.mask is not None
        refit = LeastSquares(memory_budget=self.memory_budget)
        problem = problem.with_damping(problem.factor(torch.float64).damping)
        search = _Search(self, problem, initial.mask, on_iteration)
        weight = initial.weight
        rough = replace(refit, tolerance=ROUGH)
        for number, one in enumerate(self.passes):
            again = number > 0 and one == self.passes[number - 1]
            if number and search.changed:
                weight = rough.refit(problem, weight, search.mask).weight
            gained = search.run(one, weight, again=again)
            if again and gained <= self.enough * search.objective:
                break
        answer = refit.refit(problem, weight, search.mask)
        if not problem.factor(torch.float64).holds_in(torch.float32):
            search.measure_start(refit.refit(problem, initial.weight, initial.mask))
        worse = search.worse(objective_rows(problem, answer.weight, damped=True))
        if bool(worse.any()):  # the reduction was inexact
            mask = torch.where(worse[:, None], initial.mask, search.mask)
            answer = refit.refit(problem, answer.weight, mask)
        return replace(
            answer,
            iterations=len(search.history),
            history=tuple(search.history),
            stats={**answer.stats, "swaps": sum(e["swaps"] for e in search.history)},
        )

    def chunk(self, kept: int, candidates: int, device: torch.device) -> int:
        """Rows that are worked on together."""
        per_row = Reduction.row_bytes(kept, 2 * candidates)
        if per_row > self.memory_budget:
            message = (
                f"the system of one row needs {per_row} bytes, the memory budget is "
                f"{self.memory_budget}; raise it or use another method"
            )
            raise MemoryBudgetError(message)
        rows = int(self.memory_budget // per_row)
        return min(rows, CACHED_ROWS) if device.type == "cpu" else rows


class _Search:
    """Mask and history of a layer, and what is known about its start."""

    def __init__(
        self,
        options: Descent,
        problem: LayerProblem,
        mask: Tensor,
        on_iteration: OnIteration | None,
    ) -> None:
        self._options, self._problem = options, problem
        self._on_iteration = on_iteration
        self._reduction = Reduction(problem)
        self._bound = problem.factor(torch.float64).inverse_diagonal()
        self._moved = torch.ones(len(mask), dtype=torch.bool, device=mask.device)
        self._begin = torch.full_like(problem.energy, torch.inf)
        self.mask = mask.clone()
        self.history: list[Mapping[str, float]] = []

    @property
    def objective(self) -> float:
        """Objective of the layer at the start, refitted."""
        return float(self._begin.sum())

    def worse(self, reached: Tensor) -> Tensor:
        """Rows that ended above their start, (out,)."""
        return reached > (1 + WORSE) * self._begin + NOISE * self._problem.energy

    def measure_start(self, start: Answer) -> None:
        """Rows of the refitted start, where a gram is too close to singular to reduce."""
        self._begin = objective_rows(self._problem, start.weight, damped=True)

    @property
    def changed(self) -> bool:
        """Whether the last pass moved any row."""
        return bool(self._moved.any())

    def run(self, options: Pass, weight: Tensor, *, again: bool) -> float:
        """One pass from weights on the mask; returns what it gained.

        A pass that is made again is over the rows that it moved the last time.
        """
        every = torch.arange(len(self.mask), device=self.mask.device)
        chosen = every[self._moved] if again else every
        if len(chosen) == 0:
            return 0.0
        self._moved = torch.zeros_like(self._moved)
        fixed, gained = self._problem.with_pattern(FixedMask(self.mask.clone())), 0.0
        kept = int(self.mask.sum(dim=1).amax())
        chunk = self._options.chunk(kept, options.candidates, self.mask.device)
        first = self._begin.isinf()
        for rows in torch.split(chosen, chunk):
            part, before = fixed.rows(rows), self.mask[rows]
            gain, value = self._descend(options, part, rows, weight[rows].double())
            self._begin[rows] = torch.where(first[rows], value, self._begin[rows])
            gained += float(gain.sum())
            self._moved[rows] = (self.mask[rows] != before).any(dim=1)
        return gained

    def _descend(
        self, options: Pass, part: LayerProblem, rows: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Exchange in some rows: what they gain, and their objectives before, (rows,)."""
        pattern = self._problem.pattern
        rest, mask = residual(part, weight), self.mask[rows]
        index = choose_undecided(
            pattern, weight, mask, rest, self._bound, options.candidates
        )
        small = self._reduction.of(weight, mask, rest, index)
        width, groups, count = mask.shape[1], None, index.shape[1] // 2
        if isinstance(pattern, NM):
            groups = index // pattern.m
            count = index.shape[1] * pattern.n // pattern.m
        pivots = Pivots(small.matrix, small.target, count, index < width, groups)
        on = torch.nn.functional.pad(weight, (0, 1)).gather(1, index)
        form = ((small.matrix @ on[:, :, None])[:, :, 0] - 2 * small.target) * on
        begin = objective_rows(part, weight, damped=True) - small.gain
        begin -= (form.sum(dim=1) + pivots.gained).nan_to_num(nan=0.0)
        least = options.tolerance * begin.mean().clamp(min=0)
        least = torch.maximum(least, NOISE * part.energy)
        gain = torch.zeros_like(begin)
        kept, live = pivots.kept.clone(), torch.arange(len(rows), device=rows.device)
        compared = COMPARED if groups is None else index.shape[1]
        for _ in range(self._options.rounds):
            best = pivots.best(compared)
            moving = (best.change < -least[live]).nonzero()[:, 0]
            if len(moving) == 0:
                break
            if len(moving) < len(live):
                live = live[moving]
                pivots.rows(moving)
            pivots.exchange(best.entering[moving], best.leaving[moving])
            gain[live] -= best.change[moving]
            kept[live] = pivots.kept
            self._report(float((begin - gain).sum()), len(moving))
        wide = torch.nn.functional.pad(mask, (0, 1))
        self.mask[rows] = wide.scatter(1, index, kept)[:, :width]
        return gain, begin

    def _report(self, objective: float, swaps: int) -> None:
        entry = {"objective": objective, "swaps": float(swaps)}
        self.history.append(entry)
        if self._on_iteration is not None:
            self._on_iteration(entry)

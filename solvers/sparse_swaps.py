r"""SparseSwaps: exchange entries of the mask while the weights stay at their dense values.

With ``E = W - What`` (the removed weights) and ``g = E G + S`` (see
:mod:`layerwise.problem`), pruning the kept u and restoring the removed q changes the
objective of a row by exactly

.. math:: 2 w_u g_u - 2 w_q g_q + w_u^2 G_{uu} + w_q^2 G_{qq} - 2 w_u w_q G_{uq}.

All pairs are compared, and every row takes its best one while that lowers the objective.

References
----------
.. [1] M. Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale",
   arXiv:2512.10922.
"""

from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import MemoryBudgetError
from layerwise.evaluate import evaluate, residual
from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import OnIteration, Solution, Status
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.options import check_at_least
from layerwise.solvers.wanda import wanda_mask

CACHE = 32 << 20  # bytes
GAIN = 1e-9  # smallest improvement worth a swap, relative to the energy of the row
PAIRS = 4  # arrays of (in, group) that a row needs


@dataclass(frozen=True)
class SparseSwaps:
    """Local search on the mask, weights unchanged; counts never change.

    Cost: O(in^2) per row and round; memory O(in^2) a row.

    Parameters
    ----------
    rounds
        Most swaps per row.
    memory_budget
        Bytes for the rows that are worked on together.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "never worse than its start"
    name: str = "sparse-swaps"
    rounds: int = 100
    memory_budget: int = LeastSquares.memory_budget

    def __post_init__(self) -> None:
        check_at_least(self, rounds=0)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Unstructured and n:m; a mask that is fixed is left alone."""
        return isinstance(problem.pattern, Unstructured | NM | FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Solution | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Solution:
        """Refine the mask of `initial`, by default Wanda's."""
        problem, _ = problem.factorized()
        mask = wanda_mask(problem, initial)
        fixed = problem.with_pattern(FixedMask(mask))
        swaps = 0
        every = torch.arange(len(mask), device=mask.device)
        movable = not isinstance(problem.pattern, FixedMask)
        group = problem.pattern.m if isinstance(problem.pattern, NM) else problem.shape[1]
        parts = torch.split(every, self._chunk(problem, group)) if movable else ()
        for rows in parts:
            swaps += self._refine(fixed.rows(rows), mask, rows, group)
        weight = torch.where(mask, problem.weight.to(problem.dtype), 0)
        stats = {"damping": problem.damping, "swaps": float(swaps)}
        return evaluate(problem, weight, mask, Status.FEASIBLE, stats=stats)

    def _chunk(self, problem: LayerProblem, group: int) -> int:
        """Rows that fit the memory budget."""
        per_row = PAIRS * 8 * problem.shape[1] * group
        if per_row > self.memory_budget:
            message = (
                f"the pairs of one row need {per_row} bytes, the memory budget is "
                f"{self.memory_budget}; raise it or use another method"
            )
            raise MemoryBudgetError(message)
        budget = self.memory_budget
        if problem.weight.device.type == "cpu":  # pairs that stay in the cache
            budget = min(budget, max(CACHE, per_row))
        return int(budget // per_row)

    def _refine(self, part: LayerProblem, mask: Tensor, rows: Tensor, group: int) -> int:
        """Swap in some rows of the mask, in place, until none improves."""
        pairs = Pairs(part, group)
        swaps = 0
        for _ in range(self.rounds):
            best, pruned, restored = pairs.best(mask[rows])
            moving = best < -GAIN * pairs.problem.energy
            if not bool(moving.any()):
                break
            if not bool(moving.all()):
                rows, pairs = rows[moving], pairs.of(moving.nonzero()[:, 0])
            mask[rows, pruned[moving]] = False
            mask[rows, restored[moving]] = True
            swaps += len(rows)
        return swaps


class Pairs:
    """All swaps of some rows within groups of columns.

    Parameters
    ----------
    problem
        The rows, on a fixed mask.
    size
        Of the groups in which entries are exchanged.
    """

    def __init__(self, problem: LayerProblem, size: int) -> None:
        self.problem, self._size = problem, size
        gram = problem.damped_gram(torch.float64)
        blocks = gram.unfold(0, size, size).unfold(1, size, size)
        blocks = blocks.diagonal().permute(2, 0, 1)  # (groups, m, m)
        weight = problem.weight.double()
        self._own = weight.square() * gram.diagonal()
        parts = weight.view(len(weight), -1, size)
        # what two entries of a group have in common, (rows, groups, m, m)
        self._shared = -2 * parts[..., :, None] * blocks * parts[..., None, :]

    def of(self, rows: Tensor) -> "Pairs":
        """Return the pairs of some of the rows."""
        chosen = copy(self)
        chosen.problem = self.problem.rows(rows)
        chosen._own, chosen._shared = self._own[rows], self._shared[rows]
        return chosen

    def best(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (rows,) each
        """Change by the best swap of every row, what it prunes, what it restores."""
        weight, size = self.problem.weight.double(), self._size
        gradient = residual(self.problem, torch.where(mask, weight, 0))
        drop = (self._own + 2 * weight * gradient).masked_fill(~mask, torch.inf)
        add = (self._own - 2 * weight * gradient).masked_fill(mask, torch.inf)
        drop, add = (part.reshape(len(mask), -1, size) for part in (drop, add))
        change = torch.add(self._shared, add[..., None, :])
        by_pruned = change.amin(dim=3).add_(drop).flatten(1)  # its best partner, by entry
        best, pruned = by_pruned.min(dim=1)
        each = torch.arange(len(mask), device=mask.device)
        partner = change[each, pruned // size, pruned % size].argmin(dim=1)
        return best, pruned, pruned // size * size + partner

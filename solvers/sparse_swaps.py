r"""SparseSwaps: exchange entries of the mask while the weights stay at their dense values.

With ``E = W - What`` (the removed weights) and ``g = E G + S`` (see
:mod:`layerwise.problem`), pruning the kept u and restoring the removed q changes the
objective of a row by exactly

.. math:: 2 w_u g_u - 2 w_q g_q + w_u^2 G_{uu} + w_q^2 G_{qq} - 2 w_u w_q G_{uq}.

All pairs are compared, and every row makes its best swap as long as that lowers the
objective. The comparison goes tile by tile, some lines of the gram against many rows, so
that only the pairs of a tile are in memory and a round reads the gram once.

References
----------
.. [1] M. Zimmer et al., "SparseSwaps: Tractable LLM Pruning Mask Refinement at Scale",
   arXiv:2512.10922.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import MemoryBudgetError
from layerwise.evaluate import residual
from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.options import check_at_least
from layerwise.solvers.wanda import wanda_mask

GAIN = 1e-9  # smallest improvement worth a swap, relative to the energy of the row
ARRAYS_PER_ROW = 12  # (in,) vectors of float64 per row
TILE = {"cpu": 2 << 20, "cuda": 256 << 20}  # bytes of the pairs that are compared at once
LINES = 8  # of the gram in a tile, at least


@dataclass(frozen=True)
class SparseSwaps:
    """Local search on the mask, weights unchanged; counts never change.

    Cost: O(in^2) per row and round; memory O(in) a row.

    Parameters
    ----------
    rounds
        Largest number of swaps per row.
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
        """Unstructured and n:m; a fixed mask is returned unchanged."""
        return isinstance(problem.pattern, Unstructured | NM | FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Refine the mask of `initial`, by default Wanda's."""
        problem, _ = problem.factorized()
        mask = wanda_mask(problem, initial)
        fixed = problem.with_pattern(FixedMask(mask))
        swaps = 0
        every = torch.arange(len(mask), device=mask.device)
        movable = not isinstance(problem.pattern, FixedMask)
        group = problem.pattern.m if isinstance(problem.pattern, NM) else problem.shape[1]
        for rows in torch.split(every, self._chunk(problem)) if movable else ():
            swaps += self._refine(fixed.rows(rows), mask, rows, group)
        weight = torch.where(mask, problem.weight.to(problem.dtype), 0)
        stats = {"damping": problem.damping, "swaps": float(swaps)}
        return Answer(weight, mask, stats=stats)

    def _chunk(self, problem: LayerProblem) -> int:
        """Rows that fit the memory budget."""
        per_row = ARRAYS_PER_ROW * 8 * problem.shape[1]
        if per_row > self.memory_budget:
            message = (
                f"one row needs {per_row} bytes, the memory budget is "
                f"{self.memory_budget}; raise it or use another method"
            )
            raise MemoryBudgetError(message)
        return self.memory_budget // per_row

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
        Size of the groups in which entries are exchanged.
    tile
        Bytes of the pairs that are compared at once; None for the default of the device.
    """

    def __init__(self, problem: LayerProblem, size: int, tile: int | None = None) -> None:
        self.problem, self._size = problem, size
        gram = problem.damped_gram(torch.float64)
        self._diagonal = gram.diagonal().clone()
        blocks = gram.unfold(0, size, size).unfold(1, size, size)
        self._blocks = blocks.diagonal().permute(2, 0, 1).contiguous()  # (groups, m, m)
        self._tile = TILE.get(gram.device.type, TILE["cpu"]) if tile is None else tile

    def of(self, rows: Tensor) -> "Pairs":
        """Return the pairs of some of the rows."""
        chosen = copy(self)
        chosen.problem = self.problem.rows(rows)
        return chosen

    def best(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (rows,) each
        """Best swap of every row: its change, the pruned and the restored entry."""
        weight, size = self.problem.weight.double(), self._size
        gradient = residual(self.problem, torch.where(mask, weight, 0))
        own = weight.square() * self._diagonal
        drop = (own + 2 * weight * gradient).masked_fill(~mask, torch.inf)
        add = (own - 2 * weight * gradient).masked_fill(mask, torch.inf)
        weight, drop, add = (part.view(len(mask), -1, size) for part in (weight, drop, add))
        best = torch.empty_like(drop)  # with the best partner, by pruned entry
        for rows, groups, lines in self._tiles(len(mask)):
            best[rows, groups, lines] = _with_partners(
                self._blocks[groups, lines],
                weight[rows, groups, lines, None],
                weight[rows, groups, None],
                add[rows, groups, None],
            ).amin(dim=3)
        change, pruned = best.add_(drop).flatten(1).min(dim=1)
        each, group = torch.arange(len(mask), device=mask.device), pruned // size
        line = pruned % size
        partner = _with_partners(
            self._blocks[group, line],
            weight[each, group, line, None],
            weight[each, group],
            add[each, group],
        ).argmin(dim=1)
        return change, pruned, group * size + partner

    def _tiles(self, count: int) -> Iterator[tuple[slice, slice, slice]]:
        """Rows, groups and lines of the gram that are compared together."""
        size, entries = self._size, max(1, self._tile // 8)
        lines = min(size, max(LINES, entries // (size * count)), max(1, entries // size))
        groups = max(1, entries // (size * size * count)) if lines == size else 1
        rows = max(1, entries // (size * lines * groups))
        for group in range(0, len(self._blocks), groups):
            for line in range(0, size, lines):
                for row in range(0, count, rows):
                    yield (
                        slice(row, row + rows),
                        slice(group, group + groups),
                        slice(line, line + lines),
                    )


def _with_partners(gram: Tensor, pruned: Tensor, restored: Tensor, add: Tensor) -> Tensor:
    """Change by restoring each entry, with its interaction with the pruned one."""
    return (gram * restored).mul_(-2 * pruned).add_(add)

r"""Greedy optimal brain surgeon: one weight at a time, the rest refitted exactly.

With ``A = (G_SS)^-1`` the inverse of the damped gram on the support of a row and v the
weights that are optimal there, removing j costs ``v_j^2 / A_jj``
(:mod:`layerwise.solvers.refit.supports`). The cheapest entry is removed, weights and
inverse are updated, and so on. Rows are independent: each has a path of removals, and the
pattern decides how many steps of its path a row takes. With one budget for the layer, the
next removal is always taken from the row in which it is cheapest.

References
----------
.. [1] B. Hassibi, D. Stork, "Second Order Derivatives for Network Pruning: Optimal Brain
   Surgeon", NIPS 1992, equation 5.
.. [2] E. Frantar, S. P. Singh, D. Alistarh, "Optimal Brain Compression", NeurIPS 2022,
   arXiv:2208.11580, algorithms 1 and 2 (paths of rows, global selection).
"""

import heapq
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.refit.supports import Supports

CACHE = 32 << 20  # bytes
COMPACTIONS = 8  # times that free slots are dropped on the way to an empty row


@dataclass(frozen=True)
class OBS:
    """Greedy removal with exact refits. Cost O(out removed in^2), memory O(in^2) a row.

    Parameters
    ----------
    memory_budget
        Bytes for the rows that are worked on together.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "certified refit"
    name: str = "obs"
    memory_budget: int = LeastSquares.memory_budget

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
        """Follow the path of every row, then refit to a certificate."""
        refit = LeastSquares(memory_budget=self.memory_budget)
        if isinstance(problem.pattern, FixedMask):
            return refit.solve(problem, initial=initial)
        problem = problem.with_damping(problem.factor(torch.float64).damping)
        budget, width = self.memory_budget, problem.shape[1]
        if problem.weight.device.type == "cpu":  # inverses that stay in the cache
            budget = min(budget, max(CACHE, Supports.row_bytes(width)))
        chunk = Supports.chunk(width, budget)
        every = torch.arange(len(problem.weight), device=problem.weight.device)
        parts = [_removal_paths(problem, rows) for rows in torch.split(every, chunk)]
        order = torch.cat([part.order for part in parts])
        costs = torch.cat([part.costs for part in parts])
        mask = _mask_along(problem, order, costs)
        return refit.refit(problem, problem.weight, mask)


@dataclass(frozen=True, eq=False)
class RemovalPaths:
    """Removals of some rows in their order.

    Parameters
    ----------
    order
        Column removed at each step, shape (rows, steps).
    costs
        Increase of the objective by each removal, shape (rows, steps).
    """

    order: Tensor
    costs: Tensor


def _removal_paths(problem: LayerProblem, rows: Tensor) -> RemovalPaths:
    """Greedy removals of some rows, as many as the pattern may need."""
    pattern, width = problem.pattern, problem.shape[1]
    full = torch.ones(len(rows), width, dtype=torch.bool, device=rows.device)
    supports = Supports(problem, rows, full)
    every = torch.arange(len(rows), device=rows.device)
    order, costs = [], []
    for step in range(_most_removed(problem)):
        price = supports.removal_costs(every)
        if isinstance(pattern, NM):
            kept = supports.mask.view(len(rows), -1, pattern.m).sum(dim=2)
            closed = (kept == pattern.n).repeat_interleave(pattern.m, dim=1)
            closed = torch.nn.functional.pad(closed, (0, 1))
            price = price.masked_fill(closed.gather(1, supports.index), torch.inf)
        cost, slot = price.min(dim=1)
        order.append(supports.index[every, slot])
        costs.append(cost)
        supports.remove(every, slot)
        if (step + 1) % max(width // COMPACTIONS, 1) == 0:
            supports.compact()
    if not order:
        nothing = torch.zeros(len(rows), 0, dtype=torch.long, device=rows.device)
        return RemovalPaths(nothing, nothing.double())
    return RemovalPaths(torch.stack(order, dim=1), torch.stack(costs, dim=1))


def _most_removed(problem: LayerProblem) -> int:
    """Largest number of steps that the pattern may need."""
    pattern, width = problem.pattern, problem.shape[1]
    if isinstance(pattern, NM):
        return width // pattern.m * (pattern.m - pattern.n)
    assert isinstance(pattern, Unstructured)
    if pattern.group == "row":
        return pattern.removed(width)
    return min(width, pattern.removed(width * len(problem.weight)))


def _mask_along(problem: LayerProblem, order: Tensor, costs: Tensor) -> Tensor:
    """Mask after the steps of each path that the pattern requires."""
    pattern, (rows, width) = problem.pattern, problem.shape
    counts = torch.full((rows, 1), order.shape[1], device=order.device)
    if isinstance(pattern, Unstructured) and pattern.group == "layer":
        taken = _cheapest(costs.tolist(), pattern.removed(rows * width))
        counts = torch.tensor(taken, device=order.device)[:, None]
    removed = torch.arange(order.shape[1], device=order.device) < counts
    mask = torch.ones(rows, width + 1, dtype=torch.bool, device=order.device)
    mask.scatter_(1, torch.where(removed, order, width), False)
    return mask[:, :width].contiguous()


def _cheapest(costs: list[list[float]], total: int) -> list[int]:
    """Number of steps of each row if the cheapest next step is taken `total` times."""
    counts = [0] * len(costs)
    queue = [(path[0], row) for row, path in enumerate(costs) if path]
    heapq.heapify(queue)
    for _ in range(total):
        _, row = heapq.heappop(queue)
        counts[row] += 1
        if counts[row] < len(costs[row]):
            heapq.heappush(queue, (costs[row][counts[row]], row))
    return counts

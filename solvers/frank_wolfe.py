r"""Frank-Wolfe: optimise a relaxed mask, then round it; weights keep their dense values.

Let ``What = M * W`` with M in the convex hull of the feasible masks, that is, with entries
in [0, 1] that sum up to the kept counts of the pattern. The damped objective is a convex
quadratic in M,

.. math:: f(M) = \langle E G, E\rangle + 2 \langle E, S\rangle + \text{const}, \qquad
          E = (1 - M) * W, \qquad \nabla f(M) = -2\, W * R, \quad R = E G + S,

and a step moves towards the mask V that minimises the linear model: the mask of the pattern
for the scores ``W * R`` [1]_. With ``D = (V - M) * W``, the best step length is
``<D, R> / <D G, D>``. The Frank-Wolfe gap ``2 <D, R>`` bounds the distance of f(M) from the
minimum of the relaxed problem. If every row has its own count, every row has its own step
length.

References
----------
.. [1] C. Roux, M. Zimmer, A. d'Aspremont, S. Pokutta, "Don't Be Greedy, Just Relax! Pruning
   LLMs via Frank-Wolfe", 2025, arXiv:2510.13713 (SparseFW).
.. [2] M. Jaggi, "Revisiting Frank-Wolfe: Projection-Free Sparse Convex Optimization", ICML
   2013, algorithms 1 and 3, and section 2 (the gap).

Notes
-----
Deviations from [1]_: (1) the exact step; ``step="open-loop"`` is the published
``2 / (t + 2)``; (2) counts are exact on the relaxed set, where the paper keeps at most the
count; (3) the best mask of several roundings is kept, including the start, so the answer is
never worse than its start; (4) any gram and cross-gram, damped; (5) for n:m, the fixed
share refers to a row, not to a group, because 0.9 of two entries is not a whole number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.evaluate import objective_rows, residual
from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.options import check_at_least, check_one_of
from layerwise.solvers.wanda import wanda_mask, wanda_scores

TIE = 1e-9  # weight of the Wanda score in the rounding, which decides between equal entries


@dataclass(frozen=True)
class FrankWolfe:
    """Steps over the relaxed masks from a warm start, rounded now and then.

    Cost: a product O(2 out in^2) a step, and two in float64 for every rounding.

    Parameters
    ----------
    fixed_share
        Share of the kept entries of the start that stay kept: those with the largest Wanda
        scores of the row, or of the layer if that is the group. 0 optimises all entries.
    step
        ``"exact"`` minimises along the direction, ``"open-loop"`` takes ``2 / (t + 2)``.
    max_iterations
        Largest number of steps.
    tolerance
        Frank-Wolfe gap at which a row stops, relative to its objective.
    round_every
        Steps between two roundings.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "never worse than its start"
    name: str = "frank-wolfe"
    fixed_share: float = 0.9
    step: Literal["exact", "open-loop"] = "exact"
    max_iterations: int = 100
    tolerance: float = 1e-3
    round_every: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.fixed_share <= 1:
            message = f"fixed_share must lie in [0, 1], got {self.fixed_share}"
            raise UsageError(message)
        check_at_least(self, max_iterations=0, tolerance=0, round_every=1)
        check_one_of(self, "step", "exact", "open-loop")

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
        """Improve the mask of `initial`, by default Wanda's."""
        start = wanda_mask(problem, initial)
        relaxed = RelaxedMask(problem, start, self._fixed(problem, start))
        best = _Best(problem, start)
        history: list[Mapping[str, float]] = []
        gap = 0.0
        for iteration in range(self.max_iterations):
            vertex, gaps = relaxed.linear_minimum()
            objective = relaxed.objective()
            active = gaps > self.tolerance * objective
            gap = float(gaps.sum() / objective.sum().clamp(min=1e-300))
            history.append({"objective": float(objective.sum()), "relative_gap": gap})
            if on_iteration is not None:
                on_iteration(history[-1])
            if not bool(active.any()):
                break
            length = 2 / (iteration + 2) if self.step == "open-loop" else None
            relaxed.move(vertex, active, length)
            if (iteration + 1) % self.round_every == 0:
                best.offer(relaxed.rounded())
        best.offer(relaxed.rounded())
        weight = torch.where(best.mask, problem.weight.to(problem.dtype), 0)
        return Answer(
            weight,
            best.mask,
            iterations=len(history),
            history=tuple(history),
            stats={"relative_gap": gap},
        )

    def _fixed(self, problem: LayerProblem, start: Tensor) -> Tensor:
        """Entries that stay kept: those of the start with the largest Wanda scores."""
        scores = wanda_scores(problem).masked_fill(~start, -1)
        if _couples_rows(problem):
            scores = scores.reshape(1, -1)
        order = scores.argsort(dim=1, descending=True, stable=True)
        kept = (scores >= 0).sum(dim=1, keepdim=True)
        count = (self.fixed_share * kept.double()).floor()
        rank = torch.arange(scores.shape[1], device=scores.device)
        fixed = torch.zeros_like(scores, dtype=torch.bool)
        return fixed.scatter_(1, order, rank < count).view_as(start)


class RelaxedMask:
    """A point of the relaxed set, with the residual at its weights kept up to date.

    Gaps, objectives and step lengths have one entry per row, or a single entry if the rows
    share a count.
    """

    def __init__(self, problem: LayerProblem, mask: Tensor, fixed: Tensor) -> None:
        self._problem, self._fixed = problem, fixed
        self._dense = problem.weight.to(problem.dtype)
        self._gram = problem.damped_gram(problem.dtype)
        self._scores = wanda_scores(problem).double()
        self._scores /= self._scores.amax().clamp(min=1e-300)
        self.values = mask.to(problem.dtype)  # M, (out, in)
        self._refresh()

    def _refresh(self) -> None:
        """Compute the residual anew, without the rounding of the steps so far."""
        fresh = residual(self._problem, self.values * self._dense)
        self._residual = fresh.to(self._dense.dtype)

    def _per_group(self, products: Tensor) -> Tensor:  # (out, in) -> (out,) or (1,)
        rows = products.sum(dim=1)
        return rows.sum(dim=0, keepdim=True) if _couples_rows(self._problem) else rows

    def objective(self) -> Tensor:
        """Damped objective f(M) as ``<E, R + S> + drift``, without the gram."""
        change = (1 - self.values.double()) * self._dense.double()
        rest = self._residual.double()
        if self._problem.shift is not None:
            rest = rest + self._problem.shift
        total = self._per_group(change * rest)
        return (total + self._per_group(self._problem.drift[:, None])).clamp(min=0)

    def linear_minimum(self) -> tuple[Tensor, Tensor]:
        """Mask V (bool) that minimises the linear model, and the gaps ``2 <D, R>``."""
        scores = (self._dense * self._residual).masked_fill(self._fixed, torch.inf)
        vertex = self._problem.pattern.mask(scores)
        direction = (vertex.to(self.values.dtype) - self.values) * self._dense
        gaps = 2 * self._per_group(direction * self._residual)
        return vertex, gaps.clamp(min=0)

    def move(self, vertex: Tensor, active: Tensor, length: float | None) -> None:
        """Step towards a vertex in the active rows, by the best length if it is None."""
        change = vertex.to(self.values.dtype) - self.values
        direction = change * self._dense
        image = direction @ self._gram
        if length is None:
            slope = self._per_group(direction * self._residual)
            curvature = self._per_group(direction * image)
            steps = (slope / curvature.clamp(min=1e-30)).clamp(min=0, max=1)
        else:
            steps = torch.full_like(active, length, dtype=self.values.dtype)
        steps = torch.where(active, steps, 0)[:, None]
        self.values += steps * change
        self._residual -= steps * image

    def rounded(self) -> Tensor:
        """Feasible mask of the largest entries; Wanda's score decides between ties."""
        self._refresh()
        order = self.values.double() + TIE * self._scores
        return self._problem.pattern.mask(order.masked_fill(self._fixed, torch.inf))


class _Best:
    """Best mask so far, row by row if every row has its own count."""

    def __init__(self, problem: LayerProblem, mask: Tensor) -> None:
        self._problem, self.mask = problem, mask
        self._rows = self._objectives(mask)

    def _objectives(self, mask: Tensor) -> Tensor:
        weight = torch.where(mask, self._problem.weight, 0)
        return objective_rows(self._problem, weight, damped=True)

    def offer(self, mask: Tensor) -> None:
        """Take the rows of this mask that are better."""
        rows = self._objectives(mask)
        better = rows < self._rows
        if _couples_rows(self._problem):
            better = (rows.sum() < self._rows.sum()).expand_as(rows)
        self.mask = torch.where(better[:, None], mask, self.mask)
        self._rows = torch.where(better, rows, self._rows)


def _couples_rows(problem: LayerProblem) -> bool:
    """Whether the rows share one count, so that they are not independent."""
    pattern = problem.pattern
    return isinstance(pattern, Unstructured) and pattern.group == "layer"

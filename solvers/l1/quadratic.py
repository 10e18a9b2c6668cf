r"""The smooth part of a layer's l1 problem, prepared once for many penalties.

All iterations work on :math:`V = U D^{1/2}` with a diagonal D, so that the gram is
:math:`C = D^{-1/2} G D^{-1/2}`, the metric is the identity and the l1 norm has weights
:math:`D^{-1/2}`. D is diag(G), or a constant if that gives the smaller condition number.

After every soft threshold :math:`V = S_t(M)`, the difference ``M - V`` times the step bound
is half a subgradient N of the penalty at V. It is dual feasible without any scaling, and
complementary to V, so that the duality gap of a row is

.. math:: (R - N)\, C^{-1} (R - N)^\top, \qquad R = T - V C .

With the residual, scaled until it is feasible, the same gap takes 2 to 4 times the
iterations, because its worst entry decides.
"""

from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from layerwise.linalg import Factor, largest_eigenvalue, smallest_eigenvalue
from layerwise.problem import LayerProblem

Metric = Literal["auto", "gram", "diagonal"]

STEP_MARGIN = 1.02  # power iteration estimates the largest eigenvalue from below


class Quadratic:
    """Gram, dense weight and shift of a problem in the chosen diagonal metric.

    Parameters
    ----------
    problem
        The layer, at a damping at which its gram factors.
    metric
        ``"gram"`` (constant), ``"diagonal"``, or ``"auto"``, the one with the smaller
        condition number.
    """

    def __init__(self, problem: LayerProblem, metric: Metric) -> None:
        self.problem = problem
        self.gram = problem.damped_gram(problem.dtype)
        self.dense = problem.weight.to(problem.dtype)
        self.factor: Factor = problem.factor()
        key = ("l1 metric", problem.damping, problem.dtype, metric)
        scale, self.lipschitz, self.smallest = problem.moments.shared(
            key, lambda: self._metric(metric)
        )
        self.root = scale.sqrt()
        self.scaled_gram = self.gram / self.root / self.root[:, None]
        self.scaled_dense = self.dense * self.root
        shift = problem.shift
        self.scaled_shift = None if shift is None else shift.to(problem.dtype) / self.root

    def _metric(self, metric: Metric) -> tuple[Tensor, float, float]:
        """Diagonal d, step bound L with ``gram <= L diag(d)``, smallest eigenvalue."""
        diagonal = self.gram.diagonal().clone()
        choices = {
            "gram": torch.ones_like(diagonal) * diagonal.mean(),
            "diagonal": diagonal,
        }
        if metric != "auto":
            choices = {metric: choices[metric]}
        best, lowest = (diagonal, 1.0, 1.0), float("inf")
        for scale in choices.values():
            root = scale.sqrt()
            largest = largest_eigenvalue(self.gram / root / root[:, None])
            smallest = smallest_eigenvalue(self.factor, 1 / root)
            if largest / smallest < lowest:
                best, lowest = (scale, largest * STEP_MARGIN, smallest), largest / smallest
        return best

    @cached_property
    def saliency(self) -> Tensor:
        """``1 / sqrt([G^-1]_jj)``, shape (in,)."""
        return self.factor.inverse_diagonal().rsqrt().to(self.dense.dtype)

    @cached_property
    def scaled_target(self) -> Tensor:
        """T in the metric, shape (out, in): the residual at zero."""
        return self.residual(torch.zeros_like(self.scaled_dense))

    def bound(self, penalty: float) -> Tensor:
        """Largest entry of half a subgradient of the l1 norm, shape (in,)."""
        return penalty / 2 / self.root

    def residual(self, scaled: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """``T - V C`` for some rows, written around the dense weight."""
        change = self.scaled_dense[rows] - scaled
        if self.scaled_shift is None:
            return change @ self.scaled_gram
        return torch.addmm(self.scaled_shift[rows], change, self.scaled_gram)

    def gap(
        self,
        scaled: Tensor,  # (rows, in)
        residual: Tensor,
        subgradient: Tensor,
        penalty: float,
        rows: Tensor,
    ) -> Tensor:  # (rows,)
        """Relative duality gap of some rows, in the working precision."""
        distance = (residual - subgradient) * self.root
        gap = self.factor.inverse_norms(distance).to(residual.dtype)
        change = self.scaled_dense[rows] - scaled
        slope = residual
        if self.scaled_shift is not None:
            slope = residual + self.scaled_shift[rows]
        primal = self.problem.drift[rows].to(residual.dtype) + (change * slope).sum(dim=1)
        primal += penalty * (scaled.abs() / self.root).sum(dim=1)
        return gap / primal.clamp(min=torch.finfo(primal.dtype).tiny)

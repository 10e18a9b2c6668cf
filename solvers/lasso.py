r"""The convex l1 problem of a layer, solved by FISTA to a duality gap.

Accelerated proximal gradient steps in a diagonal metric d,

.. math:: U_{k+1} = S_{p / (2 L d)} \big(Y_k + R(Y_k) / (L d)\big), \quad R(Y) = T - Y G,

with S the soft threshold and p the penalty. Rows are independent: each has its own
momentum, which restarts where it points uphill [2]_, and leaves the iteration when its
duality gap is small. Residuals are linear, so ``R(Y_k)`` costs nothing and an iteration
is one product with the gram. The result is always U, never the extrapolated Y.

References
----------
.. [1] A. Beck, M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for
   Linear Inverse Problems", SIAM J. Imaging Sciences 2009, section 4.
.. [2] B. O'Donoghue, E. Candes, "Adaptive Restart for Accelerated Gradient Schemes",
   Foundations of Computational Mathematics 2015, section 3.2 (gradient restart).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from layerwise.certificates import l1_bounds, l1_dual, least_squares_minimum
from layerwise.errors import InvalidProblemError
from layerwise.linalg import largest_eigenvalue, smallest_eigenvalue
from layerwise.problem import LayerProblem
from layerwise.solution import Status

Metric = Literal["auto", "gram", "diagonal"]

GAP_EVERY = 5  # iterations between two evaluations of the gap
STEP_MARGIN = 1.02  # power iteration sees the largest eigenvalue from below
STEP_GROWTH = 1.5  # where a step turns out too long after all


@dataclass(frozen=True, eq=False)
class LassoResult:
    """Solution of the convex l1 problem and its certificate.

    Parameters
    ----------
    weight
        Shape (out, in): the iterate after the soft threshold, exactly sparse.
    primal
        ``damped objective + penalty * sum|weight|``, float64.
    gap
        ``(primal - dual) / primal``: proven bound on the relative suboptimality.
    iterations
        Products with the gram.
    status
        ``OPTIMAL`` if the gap is below the tolerance, else ``MAX_ITERATIONS``.
    """

    weight: Tensor
    primal: float
    gap: float
    iterations: int
    status: Status


def lasso(
    problem: LayerProblem,
    penalty: float,
    *,
    initial: Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    metric: Metric = "auto",
    restart: bool = True,
) -> LassoResult:
    r"""Solve the convex problem alone: damped objective plus an l1 penalty.

    .. math:: \min_{\hat W} f(\hat W) + \text{penalty} \sum_{ij} |\hat W_{ij}|

    with f the damped objective, not halved: from ``penalty = 2 max|T|`` on the solution
    is zero. The pattern of the problem is ignored.

    Parameters
    ----------
    problem
        The layer.
    penalty
        Weight of the l1 norm, >= 0.
    initial
        Start, shape (out, in); the dense weight by default.
    tolerance
        Relative duality gap of every row; 0 runs all iterations.
    max_iterations
        Products with the gram.
    metric
        ``"gram"`` (one step length), ``"diagonal"`` (scaled by diag(gram)), or the one
        with the smaller condition number.
    restart
        Whether a row's momentum restarts where it points uphill.
    """
    if penalty < 0:
        message = f"penalty must not be negative, got {penalty}"
        raise InvalidProblemError(message)
    scaled, exponent = problem.normalized()
    quadratic = Quadratic(scaled.factorized()[0], metric)
    start = problem.weight if initial is None else initial
    unit_penalty = penalty * 2.0**-exponent
    weight, iterations = quadratic.minimize(
        unit_penalty, start, tolerance, max_iterations, restart=restart
    )
    bounds = l1_bounds(quadratic.problem, weight, unit_penalty)
    primal, dual = (float(rows.sum()) for rows in bounds)
    gap = (primal - dual) / primal if primal > 0 else 0.0
    status = Status.OPTIMAL if gap <= tolerance else Status.MAX_ITERATIONS
    return LassoResult(weight, primal * 2.0**exponent, gap, iterations, status)


class Quadratic:
    """The smooth part of the l1 problem, prepared once for many penalties."""

    def __init__(self, problem: LayerProblem, metric: Metric) -> None:
        self.problem = problem
        self.gram, self.target = problem.damped()
        self.dense = problem.weight.to(problem.dtype)
        shift = problem.shift
        self.shift = (
            torch.zeros_like(self.dense) if shift is None else shift.to(problem.dtype)
        )
        minimum = least_squares_minimum(problem)
        self.minimum = minimum.to(problem.dtype)
        self.excess_of_dense = (problem.drift - minimum).to(problem.dtype)
        self.scale, self.lipschitz = self._metric(metric)

    @cached_property
    def saliency(self) -> Tensor:
        """``1 / sqrt([G^-1]_jj)``, shape (in,)."""
        return self.problem.factor().inverse_diagonal().rsqrt().to(self.dense.dtype)

    def _metric(self, metric: Metric) -> tuple[Tensor, float]:
        """Diagonal d and step bound L with ``gram <= L diag(d)``."""
        diagonal = self.gram.diagonal().clone()
        choices = {
            "gram": torch.ones_like(diagonal) * diagonal.mean(),
            "diagonal": diagonal,
        }
        if metric != "auto":
            choices = {metric: choices[metric]}
        factor = self.problem.factor()
        best = (torch.ones_like(diagonal), float("inf"), float("inf"))
        for scale in choices.values():
            root = scale.sqrt()
            largest = largest_eigenvalue(self.gram / root / root[:, None])
            condition = largest / smallest_eigenvalue(factor, 1 / root)
            if condition < best[2]:
                best = (scale, largest, condition)
        return best[0], best[1] * STEP_MARGIN

    def residual(self, weight: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """``T - weight G`` for some rows, written around the dense weight."""
        return torch.addmm(self.shift[rows], self.dense[rows] - weight, self.gram)

    def minimize(
        self,
        penalty: float,
        start: Tensor,
        tolerance: float,
        max_iterations: int,
        *,
        restart: bool = True,
    ) -> tuple[Tensor, int]:
        """FISTA from `start`; returns the thresholded iterate and the iterations."""
        result = start.to(self.dense.dtype).clone()
        rows = torch.arange(len(result), device=result.device)
        iterate, rest = result.clone(), self.residual(result)
        last, last_rest = iterate, rest
        momentum = torch.ones(len(rows), 1, dtype=result.dtype, device=result.device)
        ahead = torch.zeros_like(momentum)
        iteration = 0
        for iteration in range(1, max_iterations + 1):
            point = iterate + ahead * (iterate - last)
            point_rest = rest + ahead * (rest - last_rest)
            last, last_rest = iterate, rest
            iterate, rest = self._step(point, point_rest, penalty, rows)
            grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            ahead, momentum = (momentum - 1) / grown, grown
            if restart:
                uphill = ((point - iterate) * self.scale * (iterate - last)).sum(dim=1) > 0
                ahead[uphill], momentum[uphill] = 0, 1
            if tolerance > 0 and (iteration % GAP_EVERY == 0 or iteration == 1):
                done = self._gap(iterate, rest, penalty, rows) <= tolerance
                if bool(done.any()):
                    result[rows[done]] = iterate[done]
                    more = ~done
                    rows, iterate, rest, last, last_rest, momentum, ahead = (
                        tensor[more]
                        for tensor in (
                            rows,
                            iterate,
                            rest,
                            last,
                            last_rest,
                            momentum,
                            ahead,
                        )
                    )
                    if len(rows) == 0:
                        break
        result[rows] = iterate
        return result, iteration

    def _step(
        self, point: Tensor, point_rest: Tensor, penalty: float, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Proximal gradient step, shortened until the quadratic model majorises."""
        while True:
            length = self.lipschitz * self.scale
            moved = point + point_rest / length
            trial = moved.sign() * (moved.abs() - penalty / (2 * length)).clamp_(min=0)
            rest = self.residual(trial, rows)
            change = trial - point
            curvature = (change * (point_rest - rest)).sum()
            model = (change.square() * length).sum()
            if bool(curvature <= model * (1 + 1e-5)):
                return trial, rest
            self.lipschitz *= STEP_GROWTH

    def _gap(self, weight: Tensor, rest: Tensor, penalty: float, rows: Tensor) -> Tensor:
        """Relative duality gap of some rows, in the working precision."""
        change = self.dense[rows] - weight
        excess = (change * (rest + self.shift[rows])).sum(dim=1) + self.excess_of_dense[
            rows
        ]
        above = excess + penalty * weight.abs().sum(dim=1)
        inner = (weight * rest).sum(dim=1)
        dual = l1_dual(excess.clamp(min=0), inner, rest.abs().amax(dim=1), penalty)
        primal = (above + self.minimum[rows]).clamp(min=torch.finfo(above.dtype).tiny)
        return (above - dual) / primal

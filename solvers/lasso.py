r"""The convex l1 problem of a layer, solved to a duality gap.

:math:`\min_U f(U) + p \sum_{ij} |U_{ij}|` with f the damped objective. Alternating
directions (:mod:`layerwise.solvers.l1.splitting`) iterate until the gap of every row is
proven. FISTA (:mod:`layerwise.solvers.l1.fista`) finishes rows that are still open after
some steps. The result is always exactly sparse.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from layerwise.certificates import l1_bounds
from layerwise.chunks import all_finite
from layerwise.errors import InvalidProblemError
from layerwise.linalg import ieee_products
from layerwise.problem import LayerProblem
from layerwise.solution import Status
from layerwise.solvers.l1.fista import run_fista
from layerwise.solvers.l1.quadratic import STEP_MARGIN, Metric, Quadratic
from layerwise.solvers.l1.splitting import Splitting
from layerwise.solvers.l1.state import Point
from layerwise.solvers.options import check_word

__all__ = ["STEP_MARGIN", "L1Path", "LassoResult", "Metric", "Quadratic", "lasso"]

LassoMethod = Literal["auto", "splitting", "fista"]

SPLITTING_STEPS = 100  # of "auto", before FISTA takes over


@dataclass(frozen=True, eq=False)
class LassoResult:
    """Solution of the convex l1 problem and its certificate.

    Parameters
    ----------
    weight
        Shape (out, in): the iterate after the soft threshold, exactly sparse.
    subgradient
        Shape (out, in): half a subgradient of the penalty at `weight`, the dual point of
        the gap, see :func:`layerwise.certificates.l1_bounds`.
    primal
        ``damped objective + penalty * sum|weight|``, float64. Negative if rounded moments
        give an objective below zero.
    rounding
        Bound on the rounding of `primal`: large where the terms of the objective cancel,
        as with large weights in directions in which the gram is singular.
    gap
        ``(primal - dual) / primal``: proven bound on the relative suboptimality; inf if
        nothing is proven, as with a primal value below its rounding.
    iterations
        Steps, each one product with a matrix of the size of the gram.
    checks
        Evaluations of the gap, each a product with the gram and a triangular solve.
    status
        ``OPTIMAL`` if the gap is below the tolerance, else ``MAX_ITERATIONS``;
        ``NUMERICAL_ERROR`` if the primal value is not finite.
    """

    weight: Tensor
    subgradient: Tensor
    primal: float
    rounding: float
    gap: float
    iterations: int
    checks: int
    status: Status


@ieee_products()
def lasso(
    problem: LayerProblem,
    penalty: float,
    *,
    initial: Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    method: LassoMethod = "auto",
    metric: Metric = "auto",
    restart: bool = True,
) -> LassoResult:
    r"""Solve the convex problem alone: damped objective plus an l1 penalty.

    .. math:: \min_{\hat W} f(\hat W) + \text{penalty} \sum_{ij} |\hat W_{ij}|

    Here f is the damped objective, not halved, so the solution is zero from
    ``penalty = 2 max|T|`` on. The pattern of the problem is ignored. Cost: one
    (out, in, in) product per iteration and, for alternating directions, one factorization
    and inverse of the gram.

    Parameters
    ----------
    problem
        The layer.
    penalty
        Weight of the l1 norm, >= 0.
    initial
        Start, shape (out, in); the dense weight by default.
    tolerance
        Relative duality gap of every row; 0 runs all iterations, of FISTA.
    max_iterations
        Largest number of steps.
    method
        ``"splitting"`` (alternating directions), ``"fista"``, or ``"auto"``: splitting,
        and FISTA for rows that are still open after 100 steps.
    metric
        ``"gram"`` (one step length), ``"diagonal"`` (scaled by diag(gram)), or ``"auto"``,
        the one with the smaller condition number.
    restart
        Whether the momentum of a row of FISTA restarts where it points uphill.

    Raises
    ------
    InvalidProblemError
        If the penalty is negative or not finite, or `initial` is not finite or has another
        shape.
    UsageError
        If `method` or `metric` is unknown.
    """
    if not 0 <= penalty < math.inf:
        message = f"penalty must be a finite number and not negative, got {penalty}"
        raise InvalidProblemError(message)
    if initial is not None:
        _check_start(problem, initial)
    scaled, exponent = problem.normalized()
    path = L1Path(scaled.factorized()[0], metric, method, restart=restart)
    path.start(problem.weight if initial is None else initial)
    unit_penalty = penalty * 2.0**-exponent
    point = path.minimize(unit_penalty, tolerance, max_iterations)
    return path.certify(point, unit_penalty, tolerance, exponent)


def _check_start(problem: LayerProblem, initial: Tensor) -> None:
    if tuple(initial.shape) != problem.shape:
        message = f"initial has shape {tuple(initial.shape)}, expected {problem.shape}"
        raise InvalidProblemError(message)
    if not all_finite(initial):
        message = "initial contains NaN or infinite entries"
        raise InvalidProblemError(message)


class L1Path:
    """The l1 problems of a layer for many penalties, each started from the previous one.

    Parameters
    ----------
    problem
        The layer, at a damping at which its gram factors.
    metric, method, restart
        See :func:`lasso`.
    """

    def __init__(
        self,
        problem: LayerProblem,
        metric: Metric = "auto",
        method: LassoMethod = "auto",
        *,
        restart: bool = True,
    ) -> None:
        check_word("method", method, get_args(LassoMethod))
        check_word("metric", metric, get_args(Metric))
        self.quadratic = Quadratic(problem, metric)
        self.method, self.restart = method, restart
        self._scaled = self._subgradient = self.quadratic.scaled_dense

    @cached_property
    def _splitting(self) -> Splitting:
        return Splitting(self.quadratic)

    def start(self, weight: Tensor) -> None:
        """Start the next problem at some weights; its residual is the first dual point."""
        quadratic = self.quadratic
        self._scaled = weight.detach().to(quadratic.dense.dtype) * quadratic.root
        self._subgradient = quadratic.residual(self._scaled)

    def minimize(self, penalty: float, tolerance: float, max_iterations: int) -> Point:
        """Solve for one penalty; the next call starts from this solution."""
        quadratic = self.quadratic
        bound = quadratic.bound(penalty)
        rows = torch.arange(len(self._scaled), device=self._scaled.device)
        subgradient = torch.clamp(self._subgradient, -bound, bound)
        point = Point(self._scaled.clone(), subgradient, rows)
        if tolerance > 0:
            point = self._without_zero_rows(point, bound)
        if self.method != "fista" and tolerance > 0:
            steps = max_iterations
            if self.method == "auto":
                steps = min(steps, SPLITTING_STEPS)
            point = self._splitting.run(penalty, point, tolerance, steps)
        steps = max_iterations - point.iterations
        if self.method != "splitting" and steps > 0 and len(point.open):
            point = run_fista(
                quadratic, penalty, point, tolerance, steps, restart=self.restart
            )
        self._scaled, self._subgradient = point.scaled, point.subgradient
        return point

    def _without_zero_rows(self, point: Point, bound: Tensor) -> Point:
        """Set rows to zero whose target is a subgradient there: zero is their solution."""
        target = self.quadratic.scaled_target
        zero = (target.abs() <= bound).all(dim=1)
        scaled = torch.where(zero[:, None], 0, point.scaled)
        subgradient = torch.where(zero[:, None], target, point.subgradient)
        return replace(
            point, scaled=scaled, subgradient=subgradient, open=point.open[~zero]
        )

    def weight(self, point: Point) -> Tensor:
        """Weights of a point, shape (out, in)."""
        return point.scaled / self.quadratic.root

    def certify(
        self, point: Point, penalty: float, tolerance: float, exponent: int = 0
    ) -> LassoResult:
        """Result with its gap evaluated anew in float64, scaled back by ``2^exponent``."""
        weight = self.weight(point)
        subgradient = point.subgradient * self.quadratic.root
        bounds = l1_bounds(self.quadratic.problem, weight, penalty, subgradient)
        primal, gap = float(bounds.primal.sum()), bounds.gap
        status = Status.OPTIMAL if gap <= tolerance else Status.MAX_ITERATIONS
        if not math.isfinite(primal):
            status = Status.NUMERICAL_ERROR
        unit = 2.0**exponent
        return LassoResult(
            weight=weight,
            subgradient=subgradient * unit,
            primal=primal * unit,
            rounding=float(bounds.rounding.sum()) * unit,
            gap=gap,
            iterations=point.iterations,
            checks=point.checks,
            status=status,
        )

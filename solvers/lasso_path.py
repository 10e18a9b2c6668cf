r"""The l1 problem with a given share of zeros instead of a given penalty.

The share of zeros grows with the logarithm of the penalty, almost linearly around a half.
A secant on that scale, with bounds on its slope and step, needs few penalties; each starts
at the solution of the previous one. A loose gap is enough until the share is near. Only the
last one or two problems are solved to the requested gap.
"""

import math
from dataclasses import dataclass

import torch

from layerwise.errors import InvalidProblemError
from layerwise.linalg import ieee_products
from layerwise.patterns import Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.l1.quadratic import Metric
from layerwise.solvers.l1.state import Point
from layerwise.solvers.lasso import L1Path, LassoMethod, LassoResult

LOOSE_GAP = 1e-2  # until the share of zeros is near
NEAR = 4  # times the requested accuracy
SLOPE = 0.2  # first guess: share of zeros per unit of log penalty, near a half
SLOPE_RANGE = 4  # largest factor between a measured slope and the first guess
# at a loose gap the share of zeros depends on the start, which can mislead the secant
PATIENCE = 6  # penalties after which the gap is tightened
SMALLEST_GAP = 1e-6  # to which it is tightened
LARGEST_STEP = math.log(4)
MOST_PENALTIES = 25


@dataclass(frozen=True, eq=False)
class SparseLasso:
    """Solution of an l1 problem with a requested share of zeros.

    Parameters
    ----------
    result
        Solution and certificate at the last penalty.
    penalty
        The last penalty, in units of :func:`layerwise.solvers.lasso.lasso`.
    sparsity
        Share of zeros of the weights.
    penalties
        Number of penalties tried.
    iterations, checks
        Of all penalties together, as in :class:`LassoResult`.
    """

    result: LassoResult
    penalty: float
    sparsity: float
    penalties: int
    iterations: int
    checks: int


@ieee_products()
def lasso_to_sparsity(
    problem: LayerProblem,
    sparsity: float,
    *,
    tolerance: float = 1e-3,
    accuracy: float = 1e-3,
    max_iterations: int = 2000,
    method: LassoMethod = "auto",
    metric: Metric = "auto",
) -> SparseLasso:
    """Solve the l1 problem at the penalty at which a given share of weights is zero.

    Parameters
    ----------
    problem
        The layer; its pattern is ignored.
    sparsity
        Share of zeros of the whole matrix, more than 0 and less than 1.
    tolerance
        Relative duality gap of every row at the returned penalty.
    accuracy
        Largest difference between the share of zeros and `sparsity`.
    max_iterations
        Largest number of steps per penalty.
    method, metric
        See :func:`layerwise.solvers.lasso.lasso`.

    Returns
    -------
    SparseLasso
        The last penalty tried, even if none reaches the accuracy, as with few weights.
    """
    if not 0 < sparsity < 1:
        message = f"sparsity must be more than 0 and less than 1, got {sparsity}"
        raise InvalidProblemError(message)
    scaled, exponent = problem.normalized()
    posed = scaled.factorized()[0]
    path = L1Path(posed, metric, method)
    path.start(posed.weight)
    search = ShareSearch(math.log(penalty_of_diagonal(posed, sparsity)), sparsity)
    gap = max(tolerance, LOOSE_GAP)
    iterations = checks = penalties = 0
    while True:
        penalties += 1
        penalty = math.exp(search.log_penalty)
        point = path.minimize(penalty, gap, max_iterations)
        iterations, checks = iterations + point.iterations, checks + point.checks
        share = zeros(point)
        missed = abs(share - sparsity)
        if (missed <= accuracy and gap <= tolerance) or penalties == MOST_PENALTIES:
            break
        if missed > accuracy:
            search.update(share)
        if gap > tolerance and (missed <= NEAR * accuracy or penalties >= PATIENCE):
            gap = tolerance
        elif penalties >= PATIENCE:
            gap = max(gap / 4, SMALLEST_GAP)
    result = path.certify(point, penalty, tolerance, exponent)
    return SparseLasso(
        result, penalty * 2.0**exponent, share, penalties, iterations, checks
    )


class ShareSearch:
    """Secant on the logarithm of the penalty, with bounds on its slope.

    There is no bracket: shares at a loose gap are a little wrong, and a bracket with a
    wrong end could exclude the answer.

    Parameters
    ----------
    log_penalty
        First guess.
    sparsity
        Share of zeros to reach.
    """

    def __init__(self, log_penalty: float, sparsity: float) -> None:
        self.log_penalty = log_penalty
        self._sparsity, self._slope = sparsity, SLOPE
        self._last: tuple[float, float] | None = None

    def update(self, share: float) -> None:
        """Move to the next penalty."""
        here = self.log_penalty
        if self._last is not None and here != self._last[0]:
            slope = (share - self._last[1]) / (here - self._last[0])
            self._slope = min(max(slope, SLOPE / SLOPE_RANGE), SLOPE * SLOPE_RANGE)
        self._last = (here, share)
        step = (self._sparsity - share) / self._slope
        self.log_penalty = here + min(max(step, -LARGEST_STEP), LARGEST_STEP)


def penalty_of_diagonal(problem: LayerProblem, sparsity: float) -> float:
    """Penalty at which a diagonal gram would give about this share of zeros."""
    scores = 2 * problem.gram.diagonal() * problem.weight.double().abs()
    removed = ~Unstructured(sparsity, "layer").mask(scores.to(problem.dtype))
    floor = max(float(scores.max()) * 1e-6, torch.finfo(problem.dtype).tiny)
    return max(float(scores[removed].mean()), floor) if bool(removed.any()) else floor


def zeros(point: Point) -> float:
    """Share of zeros of the weights of a point."""
    return float((point.scaled == 0).double().mean())

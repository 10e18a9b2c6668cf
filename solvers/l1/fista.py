r"""FISTA for the l1 problem, in the metric of its quadratic.

.. math:: V_{k+1} = S_{p / 2 L}\big(Y_k + R(Y_k) / L\big), \quad R(Y) = T - Y C,

with S the soft threshold and p the weighted penalty. Rows are independent: each has its
own momentum, which restarts where it points uphill [2]_. Residuals are linear, so
``R(Y_k)`` needs no product, and an iteration is one product with the gram. A block of
iterations does not synchronise with the device.

References
----------
.. [1] A. Beck, M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for
   Linear Inverse Problems", SIAM J. Imaging Sciences 2009, section 4.
.. [2] B. O'Donoghue, E. Candes, "Adaptive Restart for Accelerated Gradient Schemes",
   Foundations of Computational Mathematics 2015, section 3.2 (gradient restart).
"""

import torch

from layerwise.solvers.l1.quadratic import Quadratic
from layerwise.solvers.l1.state import CHECK_EVERY, Point, keep

STEP_GROWTH = 1.5  # of the step bound, when a step was too long
MODEL_SLACK = 1e-5  # of the majorisation, for rounding


def run_fista(
    quadratic: Quadratic,
    penalty: float,
    point: Point,
    tolerance: float,
    max_iterations: int,
    *,
    restart: bool = True,
) -> Point:
    """Iterate the open rows until their gap is proven or the iterations are used up.

    If a block of iterations shows that the step bound is too small, the bound grows after
    the block, and the momentum of all rows restarts.
    """
    rows = point.open
    weight = point.scaled[rows]
    rest = quadratic.residual(weight, rows)
    last, last_rest, subgradient = weight, rest, point.subgradient[rows]
    momentum = torch.ones(len(rows), 1, dtype=weight.dtype, device=weight.device)
    ahead = torch.zeros_like(momentum)
    bound = quadratic.bound(penalty)
    iterations = checks = 0
    while len(rows) and iterations < max_iterations:
        step, threshold = 1 / quadratic.lipschitz, bound / quadratic.lipschitz
        excess = torch.zeros((), dtype=weight.dtype, device=weight.device)
        for _ in range(min(CHECK_EVERY, max_iterations - iterations)):
            iterations += 1
            trial = torch.lerp(last, weight, 1 + ahead)
            trial_rest = torch.lerp(last_rest, rest, 1 + ahead)
            last, last_rest = weight, rest
            moved = torch.add(trial, trial_rest, alpha=step)
            subgradient = torch.clamp(moved, -threshold, threshold)
            weight = moved.sub_(subgradient)
            rest = quadratic.residual(weight, rows)
            change = trial.sub_(weight)
            curvature = (change * (rest - trial_rest)).sum()
            model = quadratic.lipschitz * change.square().sum()
            excess = torch.maximum(excess, curvature - model * (1 + MODEL_SLACK))
            grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            ahead, momentum = (momentum - 1) / grown, grown
            if restart:
                uphill = (change * (weight - last)).sum(dim=1, keepdim=True) > 0
                ahead = torch.where(uphill, 0, ahead)
                momentum = torch.where(uphill, 1, momentum)
        subgradient = subgradient * quadratic.lipschitz
        if bool(excess > 0):
            quadratic.lipschitz *= STEP_GROWTH
            ahead, momentum = torch.zeros_like(ahead), torch.ones_like(momentum)
        if tolerance > 0:
            checks += 1
            gap = quadratic.gap(weight, rest, subgradient, penalty, rows)
            done = gap <= tolerance
            if bool(done.any()):
                point.stored(rows, weight, subgradient)
                rows, weight, rest, last, last_rest, subgradient, momentum, ahead = keep(
                    ~done,
                    (rows, weight, rest, last, last_rest, subgradient, momentum, ahead),
                )
    point.stored(rows, weight, subgradient)
    return point.at(rows, iterations, checks)

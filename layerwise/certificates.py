r"""Proofs of how far an answer is from the best possible one.

Refit. On a fixed support the damped problem is a least squares problem. With r the
residual ``T - w G`` set to zero off the support and ``G = L L^T``,

.. math:: f(w) - f^\star = r_S (G_{SS})^{-1} r_S \le r_S (G^{-1})_{SS} r_S = \|L^{-1} r\|^2,

because the Schur complement makes ``(G^-1)_SS`` the larger of the two. One triangular
solve certifies every row.

l1. For ``f(w) + penalty * ||w||_1`` the scaled residual is dual feasible; primal minus
dual bounds the excess of every row.
"""

import torch
from torch import Tensor

from layerwise.evaluate import objective_rows, residual
from layerwise.problem import LayerProblem
from layerwise.solution import Certificate

ENERGY_FLOOR = 1e-12  # optima below this share of a row's energy count as this share


def refit_excess(problem: LayerProblem, weight: Tensor, mask: Tensor) -> Tensor:
    """Bound on every row's excess over its damped optimum on the mask, relative to it.

    Parameters
    ----------
    problem
        The problem at the damping that was used.
    weight, mask
        Shape (out, in), the weight zero off the mask.

    Returns
    -------
    Tensor
        Shape (out,), float64: ``||L^-1 r||^2`` divided by the row's damped optimum, which
        itself is bounded from below by the objective minus the excess and floored at
        1e-12 of the row's energy. Rows without residual get 0, and all rows get inf if
        the gram is singular at this damping.
    """
    factor = problem.factor(torch.float64)
    if factor.raised:  # the gram is singular at this damping, and proves nothing
        return torch.full_like(problem.energy, torch.inf)
    stationarity = torch.where(mask, residual(problem, weight), 0)
    objective = objective_rows(problem, weight, damped=True)
    return relative_excess(problem, objective, factor.inverse_norms(stationarity))


def relative_excess(problem: LayerProblem, objective: Tensor, excess: Tensor) -> Tensor:
    """Excess of every row divided by a lower bound of its damped optimum; all (out,)."""
    floor = torch.maximum(objective - excess, ENERGY_FLOOR * problem.energy)
    return torch.where(excess > 0, excess / floor, torch.zeros_like(excess))


def refit_certificate(problem: LayerProblem, weight: Tensor, mask: Tensor) -> Certificate:
    """Certificate of the worst row of :func:`refit_excess`."""
    worst = float(refit_excess(problem, weight, mask).max())
    return Certificate("refit", worst, "damped optimum of the row on its mask")


def l1_bounds(
    problem: LayerProblem,
    weight: Tensor,  # (out, in)
    penalty: float,
) -> tuple[Tensor, Tensor]:  # (out,), (out,)
    """Primal value and a dual lower bound of the damped l1 problem, row by row, float64.

    The dual point is ``2 a (Aw - b)`` with ``A^T A = G``; its value at the best feasible
    scale a in ``[-1, 1] * penalty / (2 max|r|)`` is
    ``f_min - a^2 q + 2 a (w r + q)``, where ``q = f(w) - f_min`` and f_min is the damped
    least squares minimum without penalty.
    """
    stationarity = residual(problem, weight)
    smooth = objective_rows(problem, weight, damped=True)
    primal = smooth + penalty * weight.double().abs().sum(dim=1)
    minimum = least_squares_minimum(problem)
    inner = (weight.double() * stationarity).sum(dim=1)
    dual = l1_dual(smooth - minimum, inner, stationarity.abs().amax(dim=1), penalty)
    return primal, minimum + dual


def l1_dual(
    excess: Tensor,  # (out,)
    inner: Tensor,  # (out,)
    largest_residual: Tensor,  # (out,)
    penalty: float,
) -> Tensor:  # (out,)
    """Dual value above the least squares minimum, at the best feasible scaling."""
    limit = penalty / (2 * largest_residual).clamp(min=torch.finfo(excess.dtype).tiny)
    slope = inner + excess
    best = slope / excess.clamp(min=torch.finfo(excess.dtype).tiny)
    scale = torch.minimum(torch.maximum(best, -limit), limit)
    return torch.where(excess > 0, scale * (2 * slope - scale * excess), 0)


def least_squares_minimum(problem: LayerProblem) -> Tensor:
    """Damped minimum without any constraint, row by row, shape (out,), float64."""
    if problem.shift is None:
        return problem.drift
    factor = problem.factor(torch.float64)
    if factor.raised:  # a larger damping would overstate the minimum
        return torch.zeros_like(problem.drift)
    return (problem.drift - factor.inverse_norms(problem.shift)).clamp(min=0)

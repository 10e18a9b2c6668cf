r"""Proven bounds on the distance of an answer from the best possible one.

Refit. On a fixed support S the damped problem is a least squares problem. Its Lagrange dual
has one multiplier for each weight that has to be zero. With ``G = L L^T`` and any y that
vanishes on S,

.. math:: f(w) - f^\star \le (v - y) G^{-1} (v - y) = \|L^{-1} (v - y)\|^2,
          \quad v = T - w G .

One triangular solve certifies every row. The natural y is v off the support; the dual
method of the refit (:mod:`layerwise.solvers.least_squares`) finds better ones.

v is known only up to its rounding, which a small eigenvalue of G magnifies, and f only up
to its own. The bounds include both (:mod:`layerwise.rounding`). They are negligible for a
gram with the usual damping, and dominate for a gram that is singular up to rounding.
Nothing is clamped at zero: where rounded moments give an objective below zero, nothing is
known about a ratio to it.

l1. For ``f(w) + penalty * ||w||_1`` two points are dual feasible: the scaled residual, and
half of any subgradient of the penalty. The primal value minus the better dual value bounds
the excess of every row.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from layerwise.evaluate import residual, unclamped_from_residual
from layerwise.linalg import Factor
from layerwise.problem import LayerProblem
from layerwise.rounding import (
    EPSILON,
    ROUNDING,
    damped_diagonal,
    rounding_of_objective,
    size_of_rows,
    size_of_terms,
)
from layerwise.solution import Certificate

ENERGY_FLOOR = 1e-12  # of a row's energy: the least optimum that an excess is divided by


@dataclass(frozen=True, eq=False)
class RefitState:
    """Current state of the rows of a refit; every tensor is float64.

    Parameters
    ----------
    residual
        ``T - w G - y`` of the damped problem, shape (out, in). With the natural
        multipliers it is zero off the support.
    multipliers
        y, zero on the support, shape (out, in). Off the support, the natural multipliers
        are minus half the gradient of the objective.
    objective
        Damped objective, shape (out,).
    excess
        Bound ``||L^-1 residual||^2`` on the possible decrease of the objective, shape
        (out,).
    relative
        The excess divided by a lower bound of the optimum, shape (out,).
    energy
        Energy of the dense outputs, shape (out,).
    """

    residual: Tensor
    multipliers: Tensor
    objective: Tensor
    excess: Tensor
    relative: Tensor
    energy: Tensor

    def rows(self, selection: Tensor) -> "RefitState":
        """Return the state of some rows."""
        return RefitState(*(getattr(self, f.name)[selection] for f in fields(self)))

    def put(self, selection: Tensor, other: "RefitState") -> None:
        """Overwrite some rows of this state by the rows of another one."""
        for field in fields(self):
            getattr(self, field.name)[selection] = getattr(other, field.name)


def refit_state(
    problem: LayerProblem,
    weight: Tensor,
    mask: Tensor,
    multipliers: Tensor | None = None,
) -> RefitState:
    """Residuals, objectives and certificates of weights on a mask, all at once.

    Cost: one (out, in, in) product and one triangular solve in float64.

    Parameters
    ----------
    problem
        The problem at the damping that was used.
    weight, mask
        Shape (out, in), the weight zero off the mask.
    multipliers
        Any matrix that is zero on the mask, shape (out, in), float64; None for the
        natural multipliers, ``T - w G`` off the mask.
    """
    factor = problem.factor(torch.float64)
    gradient = residual(problem, weight)
    value = unclamped_from_residual(problem, weight, gradient)
    natural = multipliers is None
    if multipliers is None:
        multipliers = torch.where(mask, 0, gradient)
    size = size_of_terms(problem, weight)
    least = value - rounding_of_objective(problem, size)
    size = size + size_of_rows(problem, multipliers)
    if natural:
        size *= mask.any(dim=1)  # the residual of a row that keeps nothing is exactly zero
    rest = gradient.sub_(multipliers)
    if factor.raised:  # the gram is singular at this damping: nothing can be proven
        excess = torch.full_like(problem.energy, torch.inf)
        relative = excess
    else:
        excess = bounded_energy(factor, rest, size)
        relative = relative_excess(problem, least, excess)
    objective = value.clamp(min=0)
    return RefitState(rest, multipliers, objective, excess, relative, problem.energy)


def dense_state(problem: LayerProblem, mask: Tensor) -> RefitState:
    """State of the dense weight on a mask, with multipliers of zero.

    If both models see the same inputs, the objective without a mask has the minimum zero,
    so the excess is at most the whole objective and costs one product. Otherwise the cost
    is that of :func:`refit_state`.

    Parameters
    ----------
    problem
        The problem at the damping that was used.
    mask
        Shape (out, in).
    """
    weight = torch.where(mask, problem.weight.double(), 0)
    zeros = torch.zeros_like(weight)
    if problem.shift is not None or problem.factor(torch.float64).raised:
        return refit_state(problem, weight, mask, zeros)
    gradient = residual(problem, weight)
    value = unclamped_from_residual(problem, weight, gradient)
    rounding = rounding_of_objective(problem, size_of_terms(problem, weight))
    excess = (value + rounding).clamp(min=0)
    relative = relative_excess(problem, value - rounding, excess)
    objective = value.clamp(min=0)
    return RefitState(gradient, zeros, objective, excess, relative, problem.energy)


def bounded_energy(factor: Factor, rest: Tensor, size: Tensor) -> Tensor:  # (out,)
    """Upper bound of ``r G^-1 r`` of every row r, including the rounding of r.

    With g the diagonal of G, the error of entry j of r is ``sqrt(in g_j size) eps``. The
    factor adds a relative error of ``in eps`` times the trace of the inverse at unit
    diagonal.

    Parameters
    ----------
    factor
        Factor of G, in float64.
    rest
        Rows r, shape (out, in).
    size
        Size of the terms that r was computed from, in the sense of
        :func:`layerwise.rounding.size_of_terms`, shape (out,); zero for rows without
        rounding.
    """
    width, trace = len(factor.lower), factor.unit_trace
    energy = factor.inverse_norms(rest)
    lost = width * EPSILON * trace
    if not lost < 0.5:  # only rows of zeros have a known energy
        return torch.where((size > 0) | (energy > 0), torch.inf, 0.0).to(energy)
    rounding = size.sqrt() * (ROUNDING * EPSILON * (width * trace) ** 0.5)
    bound: Tensor = (energy.sqrt() + rounding).square_() / (1 - lost)
    return bound


def refit_excess(problem: LayerProblem, weight: Tensor, mask: Tensor) -> Tensor:
    """Bound on every row's excess over its damped optimum on the mask, divided by it.

    Parameters
    ----------
    problem, weight, mask
        See :func:`refit_state`.

    Returns
    -------
    Tensor
        Shape (out,), float64: ``||L^-1 r||^2`` with its rounding, divided by a lower bound
        of the row's damped optimum: the objective minus the excess, at least 1e-12 of the
        row's energy. Rows that are dense get 0, and all rows get inf if the gram is
        singular at this damping. The multipliers are the natural ones; a refit with better
        multipliers may have proven a smaller bound.
    """
    return refit_state(problem, weight, mask).relative


def relative_excess(problem: LayerProblem, least: Tensor, excess: Tensor) -> Tensor:
    """Excess of every row divided by a lower bound of its damped optimum; all (out,).

    `least` is the objective minus its rounding.
    """
    floor = torch.maximum(least - excess, ENERGY_FLOOR * problem.energy)
    relative = torch.where(excess == 0, 0, excess / floor)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)  # nan: nothing is proven


def refit_certificate(problem: LayerProblem, weight: Tensor, mask: Tensor) -> Certificate:
    """Certificate of the worst row, by :func:`refit_excess`."""
    return certificate_of(refit_excess(problem, weight, mask))


def certificate_of(relative: Tensor) -> Certificate:
    """Certificate of the worst of some rows, from their :func:`refit_excess`."""
    worst = float(relative.max())
    return Certificate("refit", worst, "damped optimum of the row on its mask")


class L1Bounds(NamedTuple):
    """What is proven about weights of the damped l1 problem, row by row, float64, (out,).

    Parameters
    ----------
    primal
        Value at the weights, which rounded moments can make negative.
    rounding
        Bound on the rounding of the primal value.
    excess
        Bound on the primal value minus the optimum, with all rounding.
    """

    primal: Tensor
    rounding: Tensor
    excess: Tensor

    @property
    def dual(self) -> Tensor:
        """Lower bound of the optimum, (out,)."""
        return self.primal - self.excess

    @property
    def gap(self) -> float:
        """Excess over primal value of all rows, rounded up; inf if nothing is proven."""
        excess = float(self.excess.sum())
        if excess == 0:
            return 0.0
        least = float((self.primal - self.rounding).sum())
        return excess / least * (1 + len(self.excess) * EPSILON) if least > 0 else math.inf


def l1_bounds(
    problem: LayerProblem,
    weight: Tensor,  # (out, in)
    penalty: float,
    subgradient: Tensor | None = None,  # (out, in)
) -> L1Bounds:
    """Primal value and proven excess of weights of the damped l1 problem.

    The first dual point is ``2 a (Aw - b)`` with ``A^T A = G``. At the best feasible scale
    a in ``[-1, 1] * penalty / (2 max|r|)`` it proves the excess
    ``(1 - a)^2 q + penalty ||w||_1 - 2 a w r``, where ``q = f(w) - f_min`` and f_min is the
    damped least squares minimum without penalty.

    A second dual point comes from any n with entries in ``[-1, 1] * penalty / 2``, such as
    half a `subgradient` of the penalty. The minimum of ``f(v) + 2 n v`` over v is
    ``f(w) + 2 n w - (r - n) G^-1 (r - n)``, so that the excess is at most
    ``penalty ||w||_1 - 2 n w + (r - n) G^-1 (r - n)``. The smaller excess counts.
    """
    dense, rest = weight.double(), residual(problem, weight)
    size = size_of_terms(problem, weight)
    smooth = unclamped_from_residual(problem, weight, rest)
    of_smooth = rounding_of_objective(problem, size)
    norm = penalty * dense.abs().sum(dim=1)
    of_norm = problem.shape[1] * EPSILON * norm
    above = (smooth + of_smooth - least_squares_minimum(problem)).clamp(min=0)
    excess = norm + of_norm + _scaled_residual(problem, dense, rest, above, size, penalty)
    factor = problem.factor(torch.float64)
    if subgradient is not None and not factor.raised:  # else the bound is not valid
        feasible = subgradient.double().clamp(-penalty / 2, penalty / 2)
        second = norm + 2 * of_norm - 2 * (feasible * dense).sum(dim=1)
        size = size + size_of_rows(problem, feasible)
        second = second.clamp(min=0) + bounded_energy(factor, rest - feasible, size)
        excess = torch.minimum(excess, second)
    excess = excess.nan_to_num(nan=torch.inf, posinf=torch.inf)
    return L1Bounds(smooth + norm, of_smooth + of_norm, excess)


def _scaled_residual(
    problem: LayerProblem,
    weight: Tensor,  # (out, in)
    rest: Tensor,  # (out, in)
    above: Tensor,  # (out,)
    size: Tensor,  # (out,)
    penalty: float,
) -> Tensor:  # (out,)
    """``(1 - a)^2 q - 2 a w r`` at the best feasible a, with its rounding."""
    width, diagonal = problem.shape[1], damped_diagonal(problem)
    unit = ROUNDING * EPSILON * width**0.5
    entry = unit * size.sqrt()[:, None] * diagonal.sqrt()  # rounding of the residual
    largest = (rest.abs() + entry).amax(dim=1)
    inner = (weight * rest).sum(dim=1)
    of_inner = unit * (width * (weight.square() @ diagonal) * size).sqrt()
    scale = best_scale(above, inner, largest, penalty)
    value = (1 - scale).square() * above - 2 * scale * inner
    bound: Tensor = value + 2 * scale.abs() * of_inner
    return bound


def best_scale(
    excess: Tensor,  # (out,)
    inner: Tensor,  # (out,)
    largest_residual: Tensor,  # (out,)
    penalty: float,
) -> Tensor:  # (out,)
    """Feasible a with the smallest ``(1 - a)^2 q - 2 a i``, for excess q and inner i."""
    tiny = torch.finfo(excess.dtype).tiny
    limit = penalty / (2 * largest_residual).clamp(min=tiny)
    best = (inner + excess) / excess.clamp(min=tiny)
    return torch.minimum(torch.maximum(best, -limit), limit)


def least_squares_minimum(problem: LayerProblem) -> Tensor:
    """Lower bound of the damped minimum without any constraint, shape (out,), float64.

    Minus infinity if the gram is singular at this damping, so that nothing is proven.
    """
    factor, drift = problem.factor(torch.float64), problem.drift
    if factor.raised:  # a larger damping would overstate the minimum
        return torch.full_like(drift, -torch.inf)
    if problem.shift is None:
        return drift
    size = size_of_terms(problem, problem.weight)
    gained = bounded_energy(factor, problem.shift, size)
    return drift - gained - 4 * EPSILON * drift.abs()

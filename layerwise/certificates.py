r"""Proven bounds on the distance of an answer from the best possible one.

Refit. On a fixed support S the damped problem is a least squares problem. Its Lagrange dual
has one multiplier for each weight that has to be zero. With ``G = L L^T`` and any y that
vanishes on S,

.. math:: f(w) - f^\star \le (v - y) G^{-1} (v - y) = \|L^{-1} (v - y)\|^2,
          \quad v = T - w G .

One triangular solve certifies every row. The natural y is v off the support; the dual
method of the refit (:mod:`layerwise.solvers.least_squares`) finds better ones.

v is known only up to its rounding, which a small eigenvalue of G magnifies. The bound
includes this rounding (:func:`bounded_energy`). It is negligible for a gram with the usual
damping, and dominates for a gram that is singular up to rounding.

l1. For ``f(w) + penalty * ||w||_1`` two points are dual feasible: the scaled residual, and
half of any subgradient of the penalty. The primal value minus the better dual value bounds
the excess of every row.

References
----------
.. [1] N. Higham, T. Mary, "A New Approach to Probabilistic Rounding Error Analysis",
   SIAM J. Scientific Computing 2019: the error of a sum of n terms is some sqrt(n) eps.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from layerwise.evaluate import objective_from_residual, objective_rows, residual
from layerwise.linalg import Factor
from layerwise.problem import LayerProblem
from layerwise.solution import Certificate

ENERGY_FLOOR = 1e-12  # of a row's energy: the least optimum that an excess is divided by
EPSILON = torch.finfo(torch.float64).eps
ROUNDING = 4.0  # times the root of the width: rounding errors of random signs, added [1]_


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
    objective = objective_from_residual(problem, weight, gradient)
    natural = multipliers is None
    if multipliers is None:
        multipliers = torch.where(mask, 0, gradient)
    size = size_of_terms(problem, weight, multipliers)
    if natural:
        size *= mask.any(dim=1)  # the residual of a row that keeps nothing is exactly zero
    rest = gradient.sub_(multipliers)
    if factor.raised:  # the gram is singular at this damping: nothing can be proven
        excess = torch.full_like(problem.energy, torch.inf)
        relative = excess
    else:
        excess = bounded_energy(factor, rest, size)
        relative = relative_excess(problem, objective, excess)
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
    objective = objective_from_residual(problem, weight, gradient)
    relative = relative_excess(problem, objective, objective)
    return RefitState(
        gradient, zeros, objective, objective.clone(), relative, problem.energy
    )


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
        Size of the terms that r was computed from (:func:`size_of_terms`), shape (out,);
        zero for rows without rounding.
    """
    width, trace = len(factor.lower), factor.trace_bound
    energy = factor.inverse_norms(rest)
    lost = width * EPSILON * trace
    if not lost < 0.5:  # only rows of zeros have a known energy
        return torch.where((size > 0) | (energy > 0), torch.inf, 0.0)
    rounding = size.sqrt() * (ROUNDING * EPSILON * (width * trace) ** 0.5)
    bound: Tensor = (energy.sqrt() + rounding).square_() / (1 - lost)
    return bound


def size_of_terms(problem: LayerProblem, weight: Tensor, *more: Tensor) -> Tensor:
    """Squared size of the terms of a residual, in units of the gram's diagonal g, (out,).

    The size is ``(W - w)^2 g``, plus ``s^2 / g`` for the shift and for `more` rows.
    """
    diagonal = problem.gram.diagonal() + problem.ridge
    change = problem.weight.double() - weight.double()
    size = change.square_() @ diagonal
    if problem.shift is not None:
        more = (*more, problem.shift)
    for rows in more:
        size += rows.square() @ (1 / diagonal)
    return size


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


def relative_excess(problem: LayerProblem, objective: Tensor, excess: Tensor) -> Tensor:
    """Excess of every row divided by a lower bound of its damped optimum; all (out,)."""
    floor = torch.maximum(objective - excess, ENERGY_FLOOR * problem.energy)
    relative = torch.where(excess == 0, 0, excess / floor)
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf)  # nan: nothing is proven


def refit_certificate(problem: LayerProblem, weight: Tensor, mask: Tensor) -> Certificate:
    """Certificate of the worst row, by :func:`refit_excess`."""
    return certificate_of(refit_excess(problem, weight, mask))


def certificate_of(relative: Tensor) -> Certificate:
    """Certificate of the worst of some rows, from their :func:`refit_excess`."""
    worst = float(relative.max())
    return Certificate("refit", worst, "damped optimum of the row on its mask")


def l1_bounds(
    problem: LayerProblem,
    weight: Tensor,  # (out, in)
    penalty: float,
    subgradient: Tensor | None = None,  # (out, in)
) -> tuple[Tensor, Tensor]:  # (out,), (out,)
    """Primal value and a dual lower bound of the damped l1 problem, row by row, float64.

    The first dual point is ``2 a (Aw - b)`` with ``A^T A = G``. Its value at the best
    feasible scale a in ``[-1, 1] * penalty / (2 max|r|)`` is
    ``f_min - a^2 q + 2 a (w r + q)``, where ``q = f(w) - f_min`` and f_min is the damped
    least squares minimum without penalty.

    A second dual point comes from any n with entries in ``[-1, 1] * penalty / 2``, such
    as half a `subgradient` of the penalty. The minimum of ``f(v) + 2 n v`` over v is
    ``f(w) + 2 n w - (r - n) G^-1 (r - n)``. The better of the two bounds counts.
    """
    stationarity = residual(problem, weight)
    smooth = objective_rows(problem, weight, damped=True)
    primal = smooth + penalty * weight.double().abs().sum(dim=1)
    minimum = least_squares_minimum(problem)
    inner = (weight.double() * stationarity).sum(dim=1)
    dual = l1_dual(smooth - minimum, inner, stationarity.abs().amax(dim=1), penalty)
    dual += minimum
    factor = problem.factor(torch.float64)
    if subgradient is None or factor.raised:  # a bound at a larger damping is not valid
        return primal, dual
    feasible = subgradient.double().clamp(-penalty / 2, penalty / 2)
    second = smooth + 2 * (feasible * weight.double()).sum(dim=1)
    size = size_of_terms(problem, weight, feasible)
    second -= bounded_energy(factor, stationarity - feasible, size)
    return primal, torch.maximum(dual, second)


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
    gained = bounded_energy(factor, problem.shift, torch.zeros_like(problem.drift))
    return (problem.drift - gained).clamp(min=0)

"""The layer problem as a CVXPY model, for any CVXPY solver and for our own tests.

A fixed mask gives a convex quadratic program. Every other pattern gives a mixed-integer
one: a boolean z per weight, ``|w| <= M z``, and counts of z. M is a proven bound. With f
the objective of a known feasible weight, every weight that is at least as good satisfies
``(w - w_ls) G (w - w_ls) <= f``, hence ``|w_j - w_ls_j| <= sqrt(f [G^-1]_jj)``.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layerwise.errors import InvalidProblemError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.problem import LayerProblem

if TYPE_CHECKING:
    import cvxpy


def to_cvxpy(problem: LayerProblem) -> "cvxpy.Problem":
    """Damped layer problem as a CVXPY model.

    Parameters
    ----------
    problem
        Any layer problem; its damped gram must be positive definite.

    Returns
    -------
    cvxpy.Problem
        Minimises the damped objective over the variable ``weight`` (out, in); patterns
        other than a fixed mask add the boolean variable ``mask``.

    Raises
    ------
    UsageError
        If CVXPY is not installed.
    InvalidProblemError
        If the damped gram is singular, or the pattern cannot be modelled.
    """
    try:
        import cvxpy
    except ImportError as error:
        message = 'to_cvxpy needs CVXPY: pip install "layerwise[cvxpy]"'
        raise UsageError(message) from error
    factor = problem.factor(torch.float64)
    if factor.raised:
        message = "the damped gram is singular; raise the damping before to_cvxpy"
        raise InvalidProblemError(message)
    lower = factor.lower.cpu().numpy()
    least_squares = problem.weight.double()
    if problem.shift is not None:
        least_squares = least_squares + factor.solve_rows(problem.shift)
    minimum = float(objective_rows(problem, least_squares, damped=True).sum())
    center = least_squares.cpu().numpy()
    weight = cvxpy.Variable(problem.shape, name="weight")
    objective = cvxpy.Minimize(cvxpy.sum_squares((weight - center) @ lower) + minimum)
    return cvxpy.Problem(objective, _constraints(problem, weight, center))


def _constraints(problem: LayerProblem, weight: Any, center: np.ndarray) -> list[Any]:
    import cvxpy

    pattern = problem.pattern
    if isinstance(pattern, FixedMask):
        removed = (~pattern.kept).double().cpu().numpy()
        return [cvxpy.multiply(removed, weight) == 0]
    mask = cvxpy.Variable(problem.shape, boolean=True, name="mask")
    bound = _weight_bounds(problem, center)
    coupled = [
        weight <= cvxpy.multiply(bound, mask),
        -weight <= cvxpy.multiply(bound, mask),
    ]
    rows, width = problem.shape
    if isinstance(pattern, Unstructured):
        if pattern.group == "layer":
            return [*coupled, cvxpy.sum(mask) == mask.size - pattern.removed(mask.size)]
        return [*coupled, cvxpy.sum(mask, axis=1) == width - pattern.removed(width)]
    if isinstance(pattern, NM):
        groups = cvxpy.reshape(mask, (rows * width // pattern.m, pattern.m), order="C")
        return [*coupled, cvxpy.sum(groups, axis=1) == pattern.n]
    message = f"the pattern {pattern} has no CVXPY model; fix its mask first"
    raise InvalidProblemError(message)


def _weight_bounds(problem: LayerProblem, center: np.ndarray) -> np.ndarray:
    """Bound on ``|w|`` of every weight that beats the magnitude mask."""
    weight = problem.weight.double()
    mask = problem.pattern.mask(weight.abs())
    feasible = torch.where(mask, weight, 0)
    excess = objective_rows(problem, feasible, damped=True)
    if isinstance(problem.pattern, Unstructured) and problem.pattern.group == "layer":
        excess = excess.sum().expand_as(excess)
    inverse = problem.factor(torch.float64).inverse_diagonal()
    radius = (excess[:, None] * inverse[None, :]).sqrt().cpu().numpy()
    bounds: np.ndarray = np.abs(center) + radius
    return bounds

"""Zeros that a weight has already: solve a problem so that they stay.

Solvers that move weights fill old zeros again, because a pattern says nothing about them.
So the problem is solved twice. The first answer gives the preferred mask. In the second
mask old zeros are removed first, then what the first answer removed, and the pattern still
holds. Where a row or group has more old zeros than the pattern asks for, all of them stay,
so there are more zeros than asked for. The weights on this mask are found by the same
solver, or by least squares if it does not handle a given mask.
"""

from dataclasses import replace

import torch
from torch import Tensor

from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solve import solve
from layerwise.solver import Solver

IN_MASK = 2.0  # above the scores of what the first answer removed
REFIT = "least-squares"
UNCHANGED = "magnitude"  # leaves the weights on a given mask as they are


def solve_within(problem: LayerProblem, solver: Solver) -> Solution:
    """Solve a problem; every zero of its weight stays zero.

    Returns
    -------
    Solution
        Its mask removes all old zeros. It satisfies the pattern, or has more zeros.
    """
    old = problem.weight == 0
    first = solve(problem, solver)
    if not bool(old.any()):
        return first
    mask = mask_within(problem, first, old)
    if torch.equal(mask, first.mask & ~old) and not bool(first.weight[~mask].any()):
        return replace(first, mask=mask)
    fixed = problem.with_pattern(FixedMask(mask))
    chosen: Solver | str = solver if solver.can_solve(fixed) else REFIT
    if chosen is REFIT and _unchanged(problem, first):
        chosen = UNCHANGED
    solution = solve(fixed, chosen)
    if solution.status is Status.OPTIMAL and not isinstance(problem.pattern, FixedMask):
        solution = replace(solution, status=Status.FEASIBLE)  # optimal on this mask alone
    return solution


def mask_within(problem: LayerProblem, first: Solution, old: Tensor) -> Tensor:
    """Mask of a pattern without the old zeros, (out, in), near that of an answer.

    Parameters
    ----------
    problem
        The problem, whose pattern holds.
    first
        An answer to it.
    old
        The zeros that stay, (out, in).
    """
    if not isinstance(problem.pattern, NM | Unstructured):
        return first.mask & ~old
    norms = problem.gram.diagonal().sqrt()
    inside = _below_one(first.weight.double().abs() * norms)
    outside = _below_one(problem.weight.double().abs() * norms)
    scores = torch.where(first.mask, IN_MASK + inside, outside)
    return problem.pattern.mask(scores.masked_fill(old, -1.0)) & ~old


def holds_at_least(pattern: Pattern, mask: Tensor) -> bool:
    """Whether a mask removes what a pattern requires, and maybe more."""
    covering = pattern.mask(mask.float())  # feasible, and keeps as much of it as can be
    return not bool((mask & ~covering).any())


def _below_one(scores: Tensor) -> Tensor:
    """Scores in the same order, from 0 to 1."""
    largest = float(scores.max())
    return scores / largest if largest > 0 else scores


def _unchanged(problem: LayerProblem, solution: Solution) -> bool:
    """Whether a solver chose a mask and left the weights as they were."""
    kept = problem.weight.masked_fill(~solution.mask, 0)
    return torch.equal(solution.weight.to(kept.dtype), kept)

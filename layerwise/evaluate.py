"""Grading of weights: objective, relative error and feasibility, always in float64.

Everything is written around the dense weight (see :mod:`layerwise.problem`), so that
cancellation does not spoil a relative error of 1e-6.
"""

import torch
from torch import Tensor

from layerwise.chunks import slabs
from layerwise.errors import VerificationError
from layerwise.moments import CenteredMoments
from layerwise.problem import CenteredProblem, LayerProblem
from layerwise.solution import Answer, Solution, Status, mask_of

UNPROVEN = 1e-8  # of the objective: a larger part by constant channels voids a certificate


def objective_rows(
    problem: LayerProblem,
    weight: Tensor,  # (out, in)
    *,
    damped: bool = False,
    bias: Tensor | None = None,  # (out,)
) -> Tensor:  # (out,)
    r"""Objective ``||W X - What Xhat - b||^2 / tokens`` of every row, float64.

    Computed as ``<E G, E> + 2 <E, S> + drift`` with ``E = W - What``; `damped` adds
    ``ridge * ||E||^2``. With a `bias` b, the value is the objective about the means plus
    the squared distance of b from the best bias. Without one, b is zero, or the best bias
    if the problem is centered; then channels that count as constant are measured as well,
    unless the objective is `damped`, as solvers see it. Cost: one (out, in, in) product in
    float64.
    """
    if bias is not None:
        centered = problem.centered()
        missed = best_bias(centered, weight) - bias.double()
        rows = objective_rows(centered, weight) + missed.square()
        if damped:
            change = problem.weight.double() - weight.double()
            rows += problem.ridge * change.square().sum(dim=1)
        return rows
    return unclamped_rows(problem, weight, damped=damped).clamp(min=0)


def unclamped_rows(
    problem: LayerProblem,
    weight: Tensor,  # (out, in)
    *,
    damped: bool = False,
) -> Tensor:  # (out,)
    """Objective of every row as the moments give it, float64.

    Rounded moments can give a little less than zero. Bounds must not hide that.
    """
    quadratic = []
    for part in slabs(len(weight)):
        change = problem.weight[part].double() - weight[part]  # no float64 copy of weight
        gradient = change @ problem.gram
        if problem.shift is not None:
            gradient.add_(problem.shift[part], alpha=2)
        if damped:
            gradient.add_(change, alpha=problem.ridge)
        quadratic.append(gradient.mul_(change).sum(dim=1))
    rows = torch.cat(quadratic) + problem.drift
    if not damped:
        rows += left_out_rows(problem, weight)
    return rows


def left_out_rows(problem: LayerProblem, weight: Tensor) -> Tensor:  # (out,)
    """Part of the objective of channels that count as constant in a centered problem."""
    moments = problem.moments
    if not isinstance(moments, CenteredMoments) or moments.left_out is None:
        return torch.zeros_like(problem.energy)
    return moments.left_out.objective_rows(problem.weight.double(), weight.double())


def residual(problem: LayerProblem, weight: Tensor) -> Tensor:
    """``T - What G`` of the damped problem in float64: minus half the gradient."""
    change = problem.weight.double() - weight.double()
    result = change @ problem.gram + problem.ridge * change
    return result if problem.shift is None else result + problem.shift


def objective_from_residual(
    problem: LayerProblem,
    weight: Tensor,  # (out, in)
    rest: Tensor,  # (out, in)
) -> Tensor:  # (out,)
    """Damped objective of weights whose :func:`residual` is known, without a product."""
    return unclamped_from_residual(problem, weight, rest).clamp(min=0)


def unclamped_from_residual(
    problem: LayerProblem,
    weight: Tensor,  # (out, in)
    rest: Tensor,  # (out, in)
) -> Tensor:  # (out,)
    """As :func:`objective_from_residual`, and negative where the moments say so."""
    change = problem.weight.double() - weight.double()
    slope = rest if problem.shift is None else rest + problem.shift
    return (change * slope).sum(dim=1) + problem.drift


def best_bias(problem: CenteredProblem, weight: Tensor) -> Tensor:
    """``W mu - What muhat``, shape (out,), float64: the bias with the smallest error."""
    moments = problem.moments
    assert moments.input_mean is not None
    assert moments.pruned_input_mean is not None
    dense, pruned = problem.weight.double(), weight.double()
    return dense @ moments.input_mean - pruned @ moments.pruned_input_mean


def relative_error(
    problem: LayerProblem, weight: Tensor, bias: Tensor | None = None
) -> float:
    """``||W X - What Xhat - b||_F / ||W X||_F``; 0 if both norms are zero."""
    return _ratio(float(objective_rows(problem, weight, bias=bias).sum()), problem)


def grade(problem: LayerProblem, answer: Answer) -> Solution:
    """Grade an answer: return the solution with its objective and relative error.

    Weights that rely on a bias are graded with their best bias. The error is relative to
    the energy of the problem as posed. A certificate is left out if it ignores channels
    that count as constant and matter. Cost: as :func:`objective_rows`.
    """
    measured = problem.centered() if answer.with_bias else problem
    rows = objective_rows(measured, answer.weight)
    objective, bias = float(rows.sum()), None
    status, certificate = answer.status, answer.certificate
    left_out = left_out_rows(measured, answer.weight).abs()
    if certificate is not None and bool((left_out > UNPROVEN * rows).any()):
        certificate = None  # it is about the other channels alone
        if status is not Status.NUMERICAL_ERROR:
            status = Status.FEASIBLE
    if isinstance(measured, CenteredProblem):
        bias = best_bias(measured, answer.weight)
    return Solution(
        weight=answer.weight,
        mask=mask_of(answer, problem.pattern),
        objective=objective,
        relative_error=_ratio(objective, problem),
        status=status,
        certificate=certificate,
        bias=bias,
        iterations=answer.iterations,
        history=answer.history,
        stats=answer.stats,
    )


def check_feasible(problem: LayerProblem, weight: Tensor, mask: Tensor) -> None:
    """Raise :class:`VerificationError` unless mask and weight satisfy the pattern."""
    if tuple(weight.shape) != problem.shape or tuple(mask.shape) != problem.shape:
        message = (
            f"the solver returned weight {tuple(weight.shape)} and mask "
            f"{tuple(mask.shape)} for a layer of shape {problem.shape}"
        )
        raise VerificationError(message)
    if mask.dtype != torch.bool or not problem.pattern.accepts(mask):
        message = f"the solver's mask does not satisfy the pattern {problem.pattern}"
        raise VerificationError(message)
    if any(bool(weight[r][~mask[r]].any()) for r in slabs(len(weight))):
        message = "the solver returned weights outside its mask"
        raise VerificationError(message)


def _ratio(objective: float, problem: LayerProblem) -> float:
    energy = float(problem.energy.sum())
    if energy > 0:
        return float((objective / energy) ** 0.5)
    return 0.0 if objective == 0 else float("inf")

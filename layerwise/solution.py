"""The answer of a solver, and the graded solution that :func:`layerwise.solve` returns.

An outcome is a status, misuse is an exception. A solver never grades itself: its
:class:`Answer` has no objective and no error. :func:`layerwise.evaluate.grade` computes
both for the :class:`Solution`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from torch import Tensor

from layerwise.patterns import Pattern


class Status(StrEnum):
    """How a solution relates to the problem as posed, its pattern included."""

    OPTIMAL = "optimal"
    """The certificate bounds the excess over the optimum by the solver's tolerance, at the
    damping in `stats` if the gram was singular at the damping of the problem."""
    FEASIBLE = "feasible"
    """The pattern holds; a heuristic chose the mask and nothing is claimed about it."""
    MAX_ITERATIONS = "max_iterations"
    """The pattern holds, but the certificate is still above the tolerance."""
    NUMERICAL_ERROR = "numerical_error"
    """Arithmetic failed; the weights must not be used."""


@dataclass(frozen=True)
class Certificate:
    """A proven bound on how far a solution is from an optimum.

    Parameters
    ----------
    kind
        ``"refit"``: excess over the best weights on the same mask; ``"l1"``: duality gap
        of the l1 problem; ``"support"``: excess over the best mask and weights.
    bound
        The bound, scale-free.
    relative_to
        Description of the value that the bound was divided by.
    """

    kind: Literal["refit", "l1", "support"]
    bound: float
    relative_to: str


@dataclass(frozen=True, eq=False)
class Answer:
    """Weights and mask from a solver, not graded, with its status and figures.

    Parameters
    ----------
    weight
        Shape (out, in), exactly zero outside `mask`.
    mask
        Shape (out, in), bool, True = kept; None for the feasible mask that keeps the
        largest weights.
    status
        See :class:`Status`.
    with_bias
        Whether the weights rely on a bias. :func:`layerwise.solve` computes the best bias
        and grades the weights with it.
    certificate, iterations, history, stats
        See :class:`Solution`.
    """

    weight: Tensor
    mask: Tensor | None = None
    status: Status = Status.FEASIBLE
    with_bias: bool = False
    certificate: Certificate | None = None
    iterations: int = 0
    history: tuple[Mapping[str, float], ...] = ()
    stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Solution:
    """Pruned weights of one layer and what is known about them.

    Parameters
    ----------
    weight
        Shape (out, in), exactly zero outside `mask`.
    mask
        Shape (out, in), bool, True = kept.
    objective
        ``||W X - What Xhat||_F^2 / tokens``, undamped, evaluated in float64.
    relative_error
        ``||W X - What Xhat||_F / ||W X||_F``.
    status
        See :class:`Status`.
    certificate
        Proven bound, or None.
    bias
        Shift (out,) to add to the layer's bias; None unless the problem is centered or
        the solver relies on a bias. It is the best one for these weights, and `objective`
        and `relative_error` hold with it.
    iterations
        Iterations of the solver's main loop, 0 for direct methods.
    history
        One mapping per iteration or round of the solver, for plots and logs.
    stats
        Further figures of the solver, such as the damping it had to use.
    """

    weight: Tensor
    mask: Tensor
    objective: float
    relative_error: float
    status: Status
    certificate: Certificate | None = None
    bias: Tensor | None = None
    iterations: int = 0
    history: tuple[Mapping[str, float], ...] = ()
    stats: Mapping[str, float] = field(default_factory=dict)


Start = Answer | Solution
"""Weights and a mask from which a solver may begin."""


def mask_of(start: Start, pattern: Pattern) -> Tensor:
    """Mask of the weights; if it is None, the feasible one that keeps the largest."""
    if start.mask is not None:
        return start.mask
    return pattern.mask(start.weight.abs().nan_to_num())

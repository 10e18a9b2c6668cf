"""What a solver returns, and what a solver is.

Outcomes are statuses, misuse is an exception. A solver never grades itself: the
objective and the relative error of a :class:`Solution` come from
:func:`layerwise.evaluate.evaluate`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    pass


class Status(StrEnum):
    """How a solution relates to the problem as posed, its pattern included."""

    OPTIMAL = "optimal"
    """The certificate bounds the excess over the optimum by the solver's tolerance, at the
    damping in the stats if the gram was singular at that of the problem."""
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
        What the bound was divided by, in words.
    """

    kind: Literal["refit", "l1", "support"]
    bound: float
    relative_to: str


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
        the solver counts on a bias. It is always the best one for these weights, and
        `objective` and `relative_error` hold with it.
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

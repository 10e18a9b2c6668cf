"""The interface of a solver."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start

OnIteration = Callable[[Mapping[str, float]], None]


@runtime_checkable
class Solver(Protocol):
    """Hyper-parameters of one algorithm: a frozen dataclass, safe to share.

    An optional attribute ``requires`` names the statistics that the algorithm reads, see
    :func:`requirements`.
    """

    @property
    def name(self) -> str:
        """Name in tables and logs."""
        ...

    def can_solve(self, problem: LayerProblem) -> bool:
        """Whether the algorithm handles the pattern of this problem."""
        ...

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Return feasible weights, starting from `initial` where that makes sense."""
        ...


class UserObject(Protocol):
    """The least interface of a user's own method, see :mod:`layerwise.foreign`."""

    def solve(self, problem: LayerProblem, /) -> Any:
        """Return something with `weight`."""
        ...


SolverLike = str | Solver | UserObject
"""A name, names joined by ``+``, a solver, or a user's own object."""


def requirements(solver: object) -> frozenset[str]:
    """Names of the statistics that a solver reads, from its attribute ``requires``.

    They are ``"gram"``, ``"mean"``, ``"fluctuation"`` and ``"gradient"``; ``"mask"`` means
    that the solver only finds weights for a fixed mask. The attribute is a constant of the
    class, or a property if it depends on the hyper-parameters. A solver without the
    attribute requires nothing.
    """
    return getattr(solver, "requires", frozenset())

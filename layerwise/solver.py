"""What a solver is."""

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from layerwise.problem import LayerProblem
from layerwise.solution import Solution

OnIteration = Callable[[Mapping[str, float]], None]


@runtime_checkable
class Solver(Protocol):
    """Hyper-parameters of one algorithm: a frozen dataclass, safe to share.

    An attribute ``requires`` names the statistics that the algorithm reads, see
    :func:`requirements`.
    """

    @property
    def name(self) -> str:
        """Name in tables and logs."""
        ...

    def can_solve(self, problem: "LayerProblem") -> bool:
        """Whether the algorithm handles the pattern of this problem."""
        ...

    def solve(
        self,
        problem: "LayerProblem",
        *,
        initial: Solution | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Solution:
        """Return feasible weights, starting from `initial` where that makes sense."""
        ...


def requirements(solver: object) -> frozenset[str]:
    """Names of the statistics that a solver reads, as its ``requires`` tells them.

    ``"gram"``, ``"mean"``, ``"fluctuation"``, ``"gradient"``, or ``"mask"`` if it only
    finds weights for a mask that is already fixed. It is a constant of the class, or a
    property where it depends on the hyper-parameters; a solver without it requires
    nothing.
    """
    return getattr(solver, "requires", frozenset())

"""Users' own objects as solvers: only ``solve(problem)`` is needed, and a `weight` back."""

from dataclasses import dataclass
from typing import Any

from layerwise.errors import UsageError
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start, Status
from layerwise.solver import OnIteration, Solver, UserObject


@dataclass(frozen=True)
class UserSolver:
    """A user's own object that lacks something of a :class:`~layerwise.Solver`.

    Attributes that only some solvers have, such as `requires` and `memory_budget`, are
    those of the object.

    Parameters
    ----------
    own
        The object: anything with ``solve(problem)`` that is not a solver already.
    """

    own: UserObject

    def __post_init__(self) -> None:
        if not callable(getattr(self.own, "solve", None)):
            message = f"{self.own!r} is not a solver: it has no solve(problem) method"
            raise UsageError(message)
        if isinstance(self.own, Solver):
            message = f"{self.own!r} is a solver already: use it as it is"
            raise UsageError(message)

    @property
    def name(self) -> str:
        """Name of the object, or else of its class."""
        return str(getattr(self.own, "name", type(self.own).__name__))

    def can_solve(self, problem: LayerProblem) -> bool:
        """What the object says, and every problem if it says nothing."""
        return bool(getattr(self.own, "can_solve", lambda _: True)(problem))

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Ask the object, which gets the problem alone."""
        return answer_of(self.own.solve(problem))

    def __getattr__(self, name: str) -> Any:
        if name == "own" or name.startswith("__"):  # pickle asks before there is an object
            raise AttributeError(name)
        return getattr(self.own, name)


def answer_of(found: Any) -> Answer:
    """Answer with all that an object has to tell; its own grades are not believed."""
    if isinstance(found, Answer):
        return found
    return Answer(
        found.weight,
        getattr(found, "mask", None),
        getattr(found, "status", Status.FEASIBLE),
        with_bias=getattr(found, "bias", None) is not None,
        certificate=getattr(found, "certificate", None),
        iterations=getattr(found, "iterations", 0),
        history=tuple(getattr(found, "history", ())),
        stats=getattr(found, "stats", {}),
    )

"""Users' own objects as solvers: ``solve(problem)`` returns something with a `weight`."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.arrays import real_tensor, tensor_of
from layerwise.errors import UsageError
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start, Status
from layerwise.solver import OnIteration, Solver, UserObject


@dataclass(frozen=True)
class UserSolver:
    """A user's own object with the full interface of a :class:`~layerwise.Solver`.

    Attributes that only some solvers have, such as `requires` and `memory_budget`, are
    read from the object.

    Parameters
    ----------
    own
        The object: anything with ``solve(problem)`` that is not a solver already.
    """

    own: UserObject

    def __post_init__(self) -> None:
        if isinstance(self.own, type):
            name = self.own.__name__
            message = f"{name} is a class, not a solver: give an instance, {name}()"
            raise UsageError(message)
        if not callable(getattr(self.own, "solve", None)):
            message = f"{self.own!r} is not a solver: it has no solve(problem) method"
            raise UsageError(message)
        if isinstance(self.own, Solver):
            message = f"{self.own!r} is a solver already: use it as it is"
            raise UsageError(message)

    @property
    def name(self) -> str:
        """Name of the object, or of its class if it has none."""
        return str(getattr(self.own, "name", type(self.own).__name__))

    def can_solve(self, problem: LayerProblem) -> bool:
        """Whether the object can; True if it has no such method."""
        return bool(getattr(self.own, "can_solve", lambda _: True)(problem))

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Return the answer of the object, which is called with the problem alone."""
        return answer_of(self.own.solve(problem))

    def __getattr__(self, name: str) -> Any:
        if name == "own" or name.startswith("__"):  # pickle looks before `own` is set
            raise AttributeError(name)
        return getattr(self.own, name)


def answer_of(result: Any) -> Answer:
    """Answer from the result of any `solve`, without the grades that it gave itself.

    A bare tensor or numpy array is the weight.

    Raises
    ------
    UsageError
        If there is no weight in it.
    InvalidProblemError
        If the weight or the mask is not a tensor or array of the right kind.
    """
    if isinstance(result, Tensor | np.ndarray):
        return Answer(real_tensor(result, "the weight of the answer"))
    if not hasattr(result, "weight"):
        message = (
            f"an answer must be a weight or have one (answer.weight), got "
            f"{'None' if result is None else type(result).__name__}"
        )
        raise UsageError(message)
    weight = real_tensor(result.weight, "the weight of the answer")
    mask = getattr(result, "mask", None)
    if mask is not None:
        mask = tensor_of(mask, "the mask of the answer", (torch.bool,), "bool")
    if isinstance(result, Answer):
        return replace(result, weight=weight, mask=mask)
    status = getattr(result, "status", Status.FEASIBLE)
    if status not in tuple(Status):
        message = f"the status of an answer is one of {', '.join(Status)}, got {status!r}"
        raise UsageError(message)
    return Answer(
        weight,
        mask,
        Status(status),
        with_bias=getattr(result, "bias", None) is not None,
        certificate=getattr(result, "certificate", None),
        iterations=getattr(result, "iterations", 0),
        history=tuple(getattr(result, "history", None) or ()),
        stats=getattr(result, "stats", None) or {},
    )

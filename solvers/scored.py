"""Base class of the solvers that choose a mask from scores and keep the weights."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration


class ScoreSolver(ABC):
    """A solver that only scores weights: the pattern keeps the largest scores.

    A subclass is a frozen dataclass of hyper-parameters with a `name`.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "none"

    @abstractmethod
    def scores(self, problem: LayerProblem) -> Tensor:
        """Score of every weight, shape (out, in), in the working precision."""

    def can_solve(self, problem: LayerProblem) -> bool:
        """Every pattern."""
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Keep the largest scores."""
        mask = problem.pattern.mask(self.scores(problem))
        return Answer(torch.where(mask, problem.weight.to(problem.dtype), 0), mask)

"""Magnitude pruning: keep the largest weights, whatever the inputs.

The baseline of every table: the optimum of the problem if the gram were the identity.

References
----------
.. [1] S. Han, J. Pool, J. Tran, W. Dally, "Learning both Weights and Connections for
   Efficient Neural Networks", NeurIPS 2015, arXiv:1506.02626, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from layerwise.evaluate import evaluate
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solver import OnIteration


@dataclass(frozen=True)
class Magnitude:
    r"""Mask from ``|W|``, weights unchanged. Cost O(out in); uses no statistics."""

    requires: ClassVar[frozenset[str]] = frozenset()
    guarantee: ClassVar[str] = "none"
    name: str = "magnitude"

    def can_solve(self, problem: LayerProblem) -> bool:
        """Every pattern is chosen from scores."""
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Solution | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Solution:
        """Keep the largest ``|W|``."""
        weight = problem.weight.to(problem.dtype)
        mask = problem.pattern.mask(weight.abs())
        weight = torch.where(mask, weight, 0)
        return evaluate(problem, weight, mask, Status.FEASIBLE)

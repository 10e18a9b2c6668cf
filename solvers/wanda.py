"""Wanda: weight times input norm.

References
----------
.. [1] M. Sun, Z. Liu, A. Bair, Z. Kolter, "A Simple and Effective Pruning Approach for
   Large Language Models", ICLR 2024, arXiv:2306.11695, equation 1.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.evaluate import evaluate
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solver import OnIteration


@dataclass(frozen=True)
class Wanda:
    r"""Mask from ``|W_ij| ||Xhat_j||``, weights unchanged. Cost O(out in).

    The score is the exact increase of the objective when the weight is removed alone and
    inputs are uncorrelated. The paper compares within rows: ``Unstructured(s, "row")``.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "none"
    name: str = "wanda"

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
        """Keep the largest scores."""
        mask = problem.pattern.mask(wanda_scores(problem))
        weight = torch.where(mask, problem.weight.to(problem.dtype), 0)
        return evaluate(problem, weight, mask, Status.FEASIBLE)


def wanda_scores(problem: LayerProblem) -> Tensor:
    """``|W_ij| sqrt(G_jj)``, shape (out, in)."""
    norms = problem.gram.diagonal().sqrt().to(problem.dtype)
    return problem.weight.abs().to(problem.dtype).mul_(norms)


def wanda_mask(problem: LayerProblem, initial: Solution | None = None) -> Tensor:
    """Feasible mask with the entries that `initial` keeps, and Wanda's where it may choose.

    That is the mask of `initial` if it satisfies the pattern; Wanda's if there is none.
    """
    scores = wanda_scores(problem)
    if initial is not None:
        scores = scores.masked_fill(initial.mask, torch.inf)
    return problem.pattern.mask(scores)

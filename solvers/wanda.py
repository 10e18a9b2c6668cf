"""Wanda: weight times input norm.

References
----------
.. [1] M. Sun, Z. Liu, A. Bair, Z. Kolter, "A Simple and Effective Pruning Approach for
   Large Language Models", ICLR 2024, arXiv:2306.11695, equation 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.problem import LayerProblem
from layerwise.solution import Start, mask_of
from layerwise.solvers.scored import ScoreSolver


@dataclass(frozen=True)
class Wanda(ScoreSolver):
    r"""Mask from ``|W_ij| ||Xhat_j||``, weights unchanged. Cost O(out in).

    If Xhat = X, the squared score is the exact increase of the objective when the weight is
    removed alone, and for uncorrelated inputs these increases add up. The paper compares
    within rows: ``Unstructured(s, "row")``.
    """

    name: str = "wanda"

    def scores(self, problem: LayerProblem) -> Tensor:
        """``|W_ij| sqrt(G_jj)``."""
        return wanda_scores(problem)


def wanda_scores(problem: LayerProblem) -> Tensor:
    """``|W_ij| sqrt(G_jj)``, shape (out, in)."""
    norms = problem.gram.diagonal().sqrt().to(problem.dtype)
    return problem.weight.abs().to(problem.dtype).mul_(norms)


def wanda_mask(problem: LayerProblem, initial: Start | None = None) -> Tensor:
    """Feasible mask that prefers the entries of `initial`, then the largest Wanda scores.

    It is the mask of `initial` if that satisfies the pattern, and Wanda's mask if there is
    no `initial`.
    """
    scores = wanda_scores(problem)
    if initial is not None:
        kept = mask_of(initial, problem.pattern)
        scores = scores.masked_fill(kept, torch.inf)
    return problem.pattern.mask(scores)

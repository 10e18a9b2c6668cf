"""RIA: relative importance of a weight times a power of its input norm.

References
----------
.. [1] Y. Zhang, H. Bai, H. Lin, J. Zhao, L. Hou, C. V. Cannistraci, "Plug-and-Play: An
   Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
   section 3 (relative importance and activations).

Notes
-----
Deviations: (1) the paper's channel permutation for n:m is left out, because it renumbers
channels outside the layer; (2) ties go by index.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.problem import LayerProblem
from layerwise.solvers.options import check_finite
from layerwise.solvers.scored import ScoreSolver


@dataclass(frozen=True)
class RIA(ScoreSolver):
    r"""Mask from ``(|W_ij| / column sum + |W_ij| / row sum) ||Xhat_j||^power``.

    Weights are unchanged. A weight is compared with its own column and its own row, so a
    channel whose weights are small throughout is not removed as a whole. Cost O(out in).

    Parameters
    ----------
    power
        Exponent of the input norm, at least 0; the paper takes 0.5.
    """

    name: str = "ria"
    power: float = 0.5

    def __post_init__(self) -> None:
        check_finite(self, "power")

    def scores(self, problem: LayerProblem) -> Tensor:
        """Relative importance times ``G_jj^(power / 2)``."""
        size = problem.weight.to(problem.dtype).abs()
        smallest = torch.finfo(size.dtype).tiny  # a row or column of zeros scores zero
        relative = size / size.sum(dim=0).clamp(min=smallest)
        relative += size / size.sum(dim=1, keepdim=True).clamp(min=smallest)
        norms = problem.gram.diagonal().sqrt().to(problem.dtype)
        return relative * norms**self.power

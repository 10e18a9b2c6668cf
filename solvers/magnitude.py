"""Magnitude pruning: keep the largest weights, regardless of the inputs.

It is the baseline of every table, and optimal if the gram is the identity.

References
----------
.. [1] S. Han, J. Pool, J. Tran, W. Dally, "Learning both Weights and Connections for
   Efficient Neural Networks", NeurIPS 2015, arXiv:1506.02626, section 3.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from layerwise.problem import LayerProblem
from layerwise.solvers.scored import ScoreSolver


@dataclass(frozen=True)
class Magnitude(ScoreSolver):
    r"""Mask from ``|W|``, weights unchanged. Cost O(out in); uses no statistics."""

    requires: ClassVar[frozenset[str]] = frozenset()
    name: str = "magnitude"

    def scores(self, problem: LayerProblem) -> Tensor:
        """``|W|``."""
        return problem.weight.to(problem.dtype).abs()

"""State that the l1 iterations share: the current point and the rows in progress."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CHECK_EVERY = 4  # iterations between two evaluations of the gap, which synchronise


@dataclass(frozen=True)
class Point:
    """Current point of an iteration, for all rows, in the metric of its quadratic.

    Parameters
    ----------
    scaled
        Shape (out, in): weights after a soft threshold, exactly sparse.
    subgradient
        Shape (out, in): half a subgradient of the penalty at those weights.
    open
        Indices of the rows whose gap is not proven yet.
    iterations
        Steps so far, each one product with a matrix of the size of the gram.
    checks
        Evaluations of the gap so far, each a product and a triangular solve.
    """

    scaled: Tensor
    subgradient: Tensor
    open: Tensor
    iterations: int = 0
    checks: int = 0

    def stored(self, rows: Tensor, scaled: Tensor, subgradient: Tensor) -> None:
        """Store the results of rows that are finished."""
        self.scaled[rows] = scaled
        self.subgradient[rows] = subgradient

    def at(self, rows: Tensor, iterations: int, checks: int) -> "Point":
        """Return the same arrays with these rows still open and more iterations counted."""
        return replace(
            self,
            open=rows,
            iterations=self.iterations + iterations,
            checks=self.checks + checks,
        )


def keep(more: Tensor, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Rows of every tensor that continue to iterate."""
    index = more.nonzero()[:, 0]
    return [torch.index_select(tensor, 0, index) for tensor in tensors]

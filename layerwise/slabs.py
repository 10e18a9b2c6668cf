"""Large matrices a part at a time, where a copy of all would be the peak of the memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

SLAB = 512  # rows


def slabs(size: int, rows: int = SLAB) -> Iterator[slice]:
    """Ranges of at most so many rows that cover all."""
    for begin in range(0, size, rows):
        yield slice(begin, min(begin + rows, size))


def all_finite(matrix: Tensor) -> bool:
    """Whether no entry of a matrix is NaN or infinite."""
    return all(bool(torch.isfinite(matrix[rows]).all()) for rows in slabs(len(matrix)))

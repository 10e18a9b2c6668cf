"""Work on rows in chunks that fit the memory."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from layerwise.errors import MemoryBudgetError

OUT_OF_MEMORY = (  # messages of a CPU, and of a GPU and its libraries
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)


def in_chunks(rows: Tensor, size: int, work: Callable[[Tensor], None]) -> None:
    """Do the work chunk by chunk; where memory runs out, continue with half the size.

    Parameters
    ----------
    rows
        Indices, shape (n,).
    size
        Rows per chunk that the memory budget allows.
    work
        Called with the indices of a chunk. It must allocate everything before it changes
        anything, because a chunk that did not fit is started again.

    Raises
    ------
    MemoryBudgetError
        If a single row does not fit.
    """
    begin = 0
    while begin < len(rows):
        try:
            work(rows[begin : begin + size])
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if size == 1:
                message = f"one row of this layer does not fit in memory: {error}"
                raise MemoryBudgetError(message) from error
            size = max(1, min(size, len(rows) - begin) // 2)
        else:
            begin += size
            continue
        if rows.device.type == "cuda":  # outside the handler, which keeps tensors alive
            torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; some libraries report it only in the message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in OUT_OF_MEMORY)


SLAB = 512  # rows
SUMMED = 128  # rows: what is converted at a time stays in the cache


def slabs(size: int, rows: int = SLAB) -> Iterator[slice]:
    """Consecutive ranges of at most `rows` rows that cover ``range(size)``."""
    for begin in range(0, size, rows):
        yield slice(begin, min(begin + rows, size))


def column_sums(values: Tensor) -> Tensor:
    """Sums over the rows of a matrix, in float64, without a float64 copy of it."""
    total = values.new_zeros(values.shape[1], dtype=torch.float64)
    for rows in slabs(len(values), SUMMED):
        total += values[rows].sum(dim=0, dtype=torch.float64)
    return total


def all_finite(matrix: Tensor) -> bool:
    """Whether no entry of a matrix is NaN or infinite."""
    return not matrix.numel() or bool(torch.isfinite(largest_of(matrix)))


def largest_of(values: Tensor) -> Tensor:
    """Largest size of an entry, a scalar; NaN if there is one. Needs no copy."""
    lowest, highest = values.aminmax()
    return torch.maximum(lowest.abs(), highest.abs())

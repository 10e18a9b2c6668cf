"""Chunks that shrink where the memory runs out."""

import pytest
import torch
from torch import Tensor

from layerwise.chunks import in_chunks
from layerwise.errors import MemoryBudgetError

ERRORS = (
    MemoryError("full"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
)


def test_all_rows_in_order() -> None:
    seen: list[Tensor] = []
    in_chunks(torch.arange(3, 10), 3, seen.append)
    assert [chunk.tolist() for chunk in seen] == [[3, 4, 5], [6, 7, 8], [9]]
    in_chunks(torch.arange(0), 3, seen.append)
    assert len(seen) == 3


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_chunks_are_halved(error: Exception) -> None:
    seen: list[int] = []
    tried: list[int] = []

    def work(rows: Tensor) -> None:
        tried.append(len(rows))
        if len(rows) > 1:
            raise error
        seen.extend(rows.tolist())

    in_chunks(torch.arange(10), 8, work)
    assert seen == list(range(10))
    assert tried == [8, 4, 2, *[1] * 10]


def test_one_row_that_does_not_fit() -> None:
    def work(_: Tensor) -> None:
        message = "full"
        raise MemoryError(message)

    with pytest.raises(MemoryBudgetError, match="one row of this layer"):
        in_chunks(torch.arange(4), 4, work)


def test_other_errors_are_left_alone() -> None:
    def work(_: Tensor) -> None:
        message = "shape mismatch"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="shape mismatch"):
        in_chunks(torch.arange(4), 4, work)

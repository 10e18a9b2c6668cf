"""The column sweep of SparseGPT over one block, as a single Triton kernel for GPUs.

A sweep of separate operations launches five small kernels per column and waits for each.
Here a program processes a tile of rows of the layer for all columns of the block. The
errors of the tile stay in registers, and column j computes
``A_j = carry_j + sum_{i<j} E_i V_ij`` from them. The result equals the sweep column by
column up to the order of the sums. Importing this module needs Triton, which comes with
PyTorch for NVIDIA GPUs.
"""

from contextlib import nullcontext

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILE = 32  # rows of the layer per program
WARPS = 4


def sweep_block(
    upper: Tensor,
    start: Tensor,
    carry: Tensor,
    result: Tensor,
    error: Tensor,
    mask: Tensor,
    block: slice,
) -> None:
    """Compute the final weights of a block of columns whose mask is known.

    Parameters
    ----------
    upper
        V, shape (in, in).
    start, carry
        Least squares weight and carried errors, shape (in, out), contiguous.
    result, error
        Same shape, contiguous; the rows of the block are written.
    mask
        Same shape, contiguous, True = kept.
    block
        Columns of the layer; their errors must fit in registers, as those of 128 do.
    """
    columns, rows = block.stop - block.start, start.shape[1]
    local = upper[block, block]
    launch = _sweep[(triton.cdiv(rows, TILE),)]  # pyright: ignore[reportIndexIssue]
    on = torch.cuda.device(start.device) if start.is_cuda else nullcontext()
    with on:  # a kernel starts on the current device, wherever its tensors are
        launch(
            local,
            start[block],
            carry[block],
            mask[block].view(torch.uint8),
            result[block],
            error[block],
            rows,
            columns,
            local.stride(0),
            local.stride(1),
            BLOCK=triton.next_power_of_2(columns),
            TILE_ROWS=TILE,
            num_warps=WARPS,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _sweep(  # type: ignore[no-untyped-def]
    upper,  # V of the block
    start,
    carry,
    mask,
    result,
    error,
    rows,
    columns,
    row_stride,
    column_stride,
    BLOCK: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """One tile of rows; pointers are to the first column of the block."""
    tile = tl.program_id(0) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = tile < rows
    index = tl.arange(0, BLOCK)
    errors = tl.zeros((BLOCK, TILE_ROWS), dtype=start.dtype.element_ty)
    for column in range(columns):
        offset = column * rows + tile
        above = upper + index * row_stride + column * column_stride
        factors = tl.load(above, mask=index < column, other=0.0)
        pivot = tl.load(upper + column * (row_stride + column_stride))
        dense = tl.load(start + offset, mask=inside, other=0.0)
        pull = tl.load(carry + offset, mask=inside, other=0.0)
        pull += tl.sum(errors * factors[:, None], axis=0)
        kept = tl.load(mask + offset, mask=inside, other=0)
        value = tl.where(kept != 0, dense + pull / pivot, 0.0)
        rest = dense - value
        tl.store(result + offset, value, mask=inside)
        tl.store(error + offset, rest, mask=inside)
        errors = tl.where(index[:, None] == column, rest[None, :], errors)

"""Products of activations: only the upper triangle, and half precision where exact.

The product of two bfloat16 numbers is exact in float32, so tensor cores that accumulate in
float32 compute grams of bfloat16 activations without loss.
"""

from functools import cache

import torch
from torch import Tensor

from layerwise.chunks import slabs
from layerwise.shifted import Shifted, add_offsets

BLOCKS = 8  # of columns: 9/16 of the products of a full square remain
SMALLEST_BLOCK = 128  # columns: fewer are not worth a product of their own
SMALLEST_GPU_BLOCK = 1024  # columns: fewer do not occupy a whole GPU


def add_gram(total: Tensor, tokens: Shifted, scale: float) -> None:
    """Add ``scale * tokens^T tokens`` to the upper triangle of a sum.

    Parameters
    ----------
    total
        Shape (in, in), float64; entries below the diagonal are undefined.
    tokens
        Chunk of n tokens of width in.
    scale
        A power of two.
    """
    values, unit = tokens.values, tokens.unit
    width = values.shape[1]
    smallest = SMALLEST_GPU_BLOCK if values.is_cuda else SMALLEST_BLOCK
    block = max(smallest, -(-width // BLOCKS))
    for begin in range(0, width, block):
        rows = slice(begin, begin + block)
        part = product(values[:, rows], values[:, begin:])
        if unit is not None:
            part = part * unit[rows, None] * unit[begin:]
        total[rows, begin:].add_(part, alpha=scale)
    add_offsets(total, tokens, tokens, scale)


def mirrored(total: Tensor) -> Tensor:
    """Symmetric copy of a sum, from its upper triangle."""
    return mirror_(total.clone())


def mirror_(total: Tensor) -> Tensor:
    """Copy the upper triangle of a sum onto the lower one, in place."""
    for rows in slabs(len(total)):
        corner = total[rows, rows].triu()
        total[rows, rows] = corner + corner.triu(1).T
        total[rows.stop :, rows] = total[rows, rows.stop :].T
    return total


def add_product(total: Tensor, left: Shifted, right: Shifted, scale: float) -> None:
    """Add ``scale * left^T right`` of chunks of widths a and b to a sum (a, b)."""
    for rows in slabs(len(total)):
        part = product(left.values[:, rows], right.values)
        for unit in (left.unit if left.unit is None else left.unit[rows, None], right.unit):
            part = part if unit is None else part * unit
        total[rows].add_(part, alpha=scale)
    add_offsets(total, left, right, scale)


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` of activations (n, a) and (n, b), in float64 or else float32."""
    if left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    precision = torch.promote_types(left.dtype, right.dtype)
    precision = torch.promote_types(precision, torch.float32)
    return left.to(precision).T @ right.to(precision)


def precision_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision in which activations of this type are multiplied on this device."""
    if dtype == torch.bfloat16 and exact_bfloat16(device):
        return torch.bfloat16
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def exact_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices with sums and results in float32."""
    probe = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(probe, probe, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # not on CPUs
        return False
    return True

"""Products of activations: only the upper triangle, and half precision where exact.

The product of two bfloat16 numbers is exact in float32, so tensor cores that accumulate in
float32 compute grams of bfloat16 activations without loss.
"""

from functools import cache

import torch
from torch import Tensor

from layerwise.chunks import slabs

BLOCKS = 8  # of columns: 9/16 of the products of a full square remain
SMALLEST_BLOCK = 128  # columns: fewer are not worth a product of their own
SMALLEST_GPU_BLOCK = 1024  # columns: fewer do not occupy a whole GPU


def add_gram(total: Tensor, tokens: Tensor, scale: float) -> None:
    """Add ``scale * tokens^T tokens`` to the upper triangle of a sum.

    Parameters
    ----------
    total
        Shape (in, in), float64; entries below the diagonal are undefined.
    tokens
        Shape (n, in).
    scale
        A power of two.
    """
    width = tokens.shape[1]
    smallest = SMALLEST_GPU_BLOCK if tokens.is_cuda else SMALLEST_BLOCK
    block = max(smallest, -(-width // BLOCKS))
    for begin in range(0, width, block):
        rows = slice(begin, begin + block)
        part = product(tokens[:, rows], tokens[:, begin:])
        total[rows, begin:].add_(part, alpha=scale)


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


def add_product(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """Add ``scale * left^T right`` of activations (n, a) and (n, b) to a sum (a, b)."""
    for rows in slabs(len(total)):
        total[rows].add_(product(left[:, rows], right), alpha=scale)


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

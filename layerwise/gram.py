"""Products of activations: the upper triangle alone, and half precision where exact.

The product of two bfloat16 numbers is a float32 number, so grams of bfloat16 activations
lose nothing in tensor cores that add up in float32.
"""

from functools import cache

import torch
from torch import Tensor

from layerwise.chunks import slabs

BLOCKS = 8  # of columns: 9/16 of the products of a full square remain
NARROW = 128  # columns that are not worth two products
FILLS = 1024  # columns that keep all of a GPU at work


def add_gram(total: Tensor, tokens: Tensor, scale: float) -> None:
    """Add ``scale * tokens^T tokens`` to the upper triangle of a sum.

    Parameters
    ----------
    total
        Shape (in, in), float64; what is below the diagonal is undefined.
    tokens
        Shape (n, in).
    scale
        A power of two.
    """
    width = tokens.shape[1]
    block = max(FILLS if tokens.is_cuda else NARROW, -(-width // BLOCKS))
    for begin in range(0, width, block):
        rows = slice(begin, begin + block)
        found = product(tokens[:, rows], tokens[:, begin:])
        total[rows, begin:].add_(found, alpha=scale)


def mirrored(total: Tensor) -> Tensor:
    """Symmetric matrix with the upper triangle of a sum."""
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
    """``left^T right`` of activations (n, a) and (n, b): float64, or else float32."""
    if left.dtype == right.dtype == torch.bfloat16:
        return torch.mm(left.T, right, out_dtype=torch.float32)
    precision = torch.promote_types(left.dtype, right.dtype)
    precision = torch.promote_types(precision, torch.float32)
    return left.to(precision).T @ right.to(precision)


def precision_of(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision in which activations of a type are multiplied on a device."""
    if dtype == torch.bfloat16 and exact_bfloat16(device):
        return torch.bfloat16
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def exact_bfloat16(device: torch.device) -> bool:
    """Whether a device adds up products of bfloat16 in float32 and gives them as such."""
    some = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(some, some, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # not on CPUs
        return False
    return True

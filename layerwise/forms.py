"""Quadratic forms and products of the rows of a weight, some rows at a time.

Sums are in float64. Products of a weight in half precision are in float32, in units of the
largest numbers: its moments come from products in float32 as well, which round no less.
"""

import math

import torch
from torch import Tensor

from layerwise.chunks import largest_of, slabs
from layerwise.moments import Moments


def precision_for(weight: Tensor, tokens: int) -> torch.dtype:
    """Precision of products that pose a problem.

    With few tokens there may be weights without any error, which float32 would hide.

    Parameters
    ----------
    weight
        Shape (out, in).
    tokens
        Number of tokens of its inputs; 0 if unknown.
    """
    half = weight.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and tokens > weight.shape[1] else torch.float64


def shift_of(
    weight: Tensor,  # (out, in)
    moments: Moments,
) -> Tensor:  # (out, in)
    """``W (C - G)`` without a copy of the gram, float64."""
    assert moments.cross_gram is not None
    result = torch.empty_like(weight, dtype=torch.float64)
    precision = precision_for(weight, moments.n_tokens)
    scaled, unit = in_units(weight, precision)
    for columns in slabs(moments.width):
        change = moments.cross_gram[:, columns] - moments.gram[:, columns]
        change, other = in_units(change, precision)
        for rows in slabs(len(weight)):
            result[rows, columns] = scaled[rows] @ change
        result[:, columns] *= unit * other
    return result


def row_forms(
    weight: Tensor,  # (out, in)
    gram: Tensor,  # (in, in)
    precision: torch.dtype = torch.float64,
) -> Tensor:  # (out,)
    """``w G w^T`` of every row, float64, with products in a precision."""
    forms = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    scaled, unit = in_units(weight, precision)
    for columns in slabs(len(gram)):
        part, other = in_units(gram[:, columns], precision)
        for rows in slabs(len(weight)):
            products = (scaled[rows] @ part).mul_(scaled[rows, columns])
            forms[rows] += products.sum(dim=1, dtype=torch.float64) * other
    return forms * unit**2


def in_units(matrix: Tensor, precision: torch.dtype) -> tuple[Tensor, float]:
    """Matrix in a precision, and the power of two that it must be multiplied with.

    In float32 its largest entry is near one, so that no product leaves the range.
    """
    if precision != torch.float32:
        return matrix.to(precision), 1.0
    largest = float(largest_of(matrix)) if matrix.numel() else 0.0
    unit = 2.0 ** math.frexp(largest)[1]
    return (matrix * (1 / unit)).to(precision), unit


def row_dots(
    one: Tensor,  # (out, in)
    other: Tensor,  # (out, in)
) -> Tensor:  # (out,)
    """Inner products of the rows of two matrices."""
    return torch.cat([(one[r] * other[r]).sum(dim=1) for r in slabs(len(one))])

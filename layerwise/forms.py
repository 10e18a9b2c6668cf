"""Quadratic forms and products of the rows of a weight, some rows at a time."""

import torch
from torch import Tensor

from layerwise.chunks import slabs
from layerwise.moments import Moments


def shift_of(
    weight: Tensor,  # (out, in)
    moments: Moments,
) -> Tensor:  # (out, in)
    """``W (C - G)`` without a copy of the gram."""
    assert moments.cross_gram is not None
    result = torch.empty_like(weight, dtype=torch.float64)
    for columns in slabs(moments.width):
        change = moments.cross_gram[:, columns] - moments.gram[:, columns]
        for rows in slabs(len(weight)):
            result[rows, columns] = weight[rows].double() @ change
    return result


def row_forms(
    weight: Tensor,  # (out, in)
    gram: Tensor,  # (in, in)
) -> Tensor:  # (out,)
    """``w G w^T`` of every row, some rows at a time."""
    forms = []
    for rows in slabs(len(weight)):
        part = weight[rows].double()
        forms.append((part @ gram).mul_(part).sum(dim=1))
    return torch.cat(forms)


def row_dots(
    one: Tensor,  # (out, in)
    other: Tensor,  # (out, in)
) -> Tensor:  # (out,)
    """Inner products of the rows of two matrices."""
    return torch.cat([(one[r] * other[r]).sum(dim=1) for r in slabs(len(one))])

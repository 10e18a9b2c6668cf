"""Checks of the data of a layer problem; an error names the position of the fault."""

from typing import Any

import torch
from torch import Tensor

from layerwise.chunks import all_finite, slabs
from layerwise.errors import InvalidProblemError

SLACK = 1e-4  # for the rounding of a gram, relative to the diagonal


def check_weight(weight: Any, width: int, device: torch.device) -> None:
    """Raise unless it is a finite matrix (out, width) on the device of its moments."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        message = "weight must be a floating point tensor of shape (out, in)"
        raise InvalidProblemError(message)
    if weight.dim() != 2 or 0 in weight.shape or weight.shape[1] != width:
        message = f"weight has shape {tuple(weight.shape)}, expected (out, {width})"
        raise InvalidProblemError(message)
    if weight.device != device:
        message = f"weight is on {weight.device}, its moments are on {device}"
        raise InvalidProblemError(message)
    if not all_finite(weight):
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        value = float(weight[row, column])
        message = f"weight contains {value} at row {row}, column {column}"
        raise InvalidProblemError(message)


def check_gradient_norm(gradient_norm: Any, weight: Tensor) -> None:
    """Raise unless it holds one finite number >= 0 per weight."""
    shape = tuple(weight.shape)
    if not isinstance(gradient_norm, Tensor) or tuple(gradient_norm.shape) != shape:
        given = getattr(gradient_norm, "shape", None)
        shown = type(gradient_norm).__name__ if given is None else tuple(given)
        message = f"gradient_norm is {shown}, expected a tensor of shape {shape}"
        raise InvalidProblemError(message)
    if gradient_norm.device != weight.device:
        message = f"gradient_norm is on {gradient_norm.device}, weight on {weight.device}"
        raise InvalidProblemError(message)
    wrong = ~(torch.isfinite(gradient_norm) & (gradient_norm >= 0))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        message = (
            f"gradient_norm contains {float(gradient_norm[row, column])} at row {row}, "
            f"column {column}; a norm must be finite and not negative"
        )
        raise InvalidProblemError(message)


def check_matrix(matrix: Tensor, name: str, width: int) -> None:
    """Raise unless it is a finite matrix (width, width)."""
    if tuple(matrix.shape) != (width, width):
        message = f"{name} has shape {tuple(matrix.shape)}, expected ({width}, {width})"
        raise InvalidProblemError(message)
    if not all_finite(matrix):
        row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
        message = f"{name} contains {float(matrix[row, column])} at ({row}, {column})"
        raise InvalidProblemError(message)


def check_gram(gram: Tensor, noise: Tensor | None, may_vanish: bool) -> bool:
    """Raise unless it is a gram up to rounding; returns whether it is exactly symmetric."""
    if gram.dim() != 2:
        message = f"gram must be a square matrix, got shape {tuple(gram.shape)}"
        raise InvalidProblemError(message)
    check_matrix(gram, "gram", gram.shape[1])
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        index = int(diagonal.argmin())
        message = f"gram has a negative diagonal: {float(diagonal[index])} at {index}"
        raise InvalidProblemError(message)
    if not may_vanish and not bool((diagonal > 0).any()):
        message = "gram is zero: every input is zero in every token"
        raise InvalidProblemError(message)
    root = (diagonal if noise is None else diagonal + noise).sqrt()
    symmetric = True
    for rows in slabs(len(gram)):  # no copy of a large gram
        part, bound = gram[rows], torch.outer(root[rows], root)
        apart = (part - gram[:, rows].T).abs()
        symmetric = symmetric and not bool(apart.any())
        wrong = apart > SLACK * bound
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            row += rows.start
            message = (
                f"gram is not symmetric: {float(gram[row, column])} at ({row}, {column}), "
                f"{float(gram[column, row])} at ({column}, {row})"
            )
            raise InvalidProblemError(message)
        wrong = part.abs() > (1 + SLACK) * bound
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            row += rows.start
            message = (
                f"gram is not positive semi-definite: |G[{row}, {column}]| exceeds "
                f"sqrt(G[{row}, {row}] G[{column}, {column}])"
            )
            raise InvalidProblemError(message)
    return symmetric

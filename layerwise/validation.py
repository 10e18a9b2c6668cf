"""Checks of the data of a layer problem; an error names the position of the fault."""

import torch
from torch import Tensor

from layerwise.chunks import all_finite, slabs
from layerwise.errors import InvalidProblemError

SLACK = 1e-4  # for the rounding of a gram, relative to the diagonal
SMALLEST_SQUARE = 1e-280  # of float64, below which squares lose digits


def check_shape(weight: Tensor, width: int) -> None:
    """Raise unless a weight is a matrix (out, width) with at least one output and input."""
    if weight.dim() != 2 or 0 in weight.shape or weight.shape[1] != width:
        shape, wanted = tuple(weight.shape), f"(out, {width})"
        if width == 0:
            wanted = "(out, in) with at least one output and one input"
        message = f"weight has shape {shape}, expected {wanted}"
        raise InvalidProblemError(message)


def check_weight(weight: Tensor, width: int, device: torch.device) -> None:
    """Raise unless it is a finite matrix (out, width) on the device of its moments."""
    check_shape(weight, width)
    if weight.device != device:
        message = f"weight is on {weight.device}, its moments are on {device}"
        raise InvalidProblemError(message)
    if not all_finite(weight):
        row, column = (~torch.isfinite(weight)).nonzero()[0].tolist()
        value = float(weight[row, column])
        message = f"weight contains {value} at row {row}, column {column}"
        raise InvalidProblemError(message)


def check_gradient_norm(gradient_norm: Tensor, weight: Tensor) -> None:
    """Raise unless it holds one finite number >= 0 per weight."""
    shape, given = tuple(weight.shape), tuple(gradient_norm.shape)
    if given != shape:
        message = f"gradient_norm is {given}, expected a tensor of shape {shape}"
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


def check_diagonal(diagonal: Tensor, may_vanish: bool) -> None:
    """Raise unless it can be the diagonal of a gram, (in,), whose squares are ordinary."""
    if bool((diagonal < 0).any()):
        index = int(diagonal.argmin())
        message = f"gram has a negative diagonal: {float(diagonal[index])} at {index}"
        raise InvalidProblemError(message)
    largest = 0.0 if len(diagonal) == 0 else float(diagonal.max())
    if largest < SMALLEST_SQUARE and not (may_vanish and largest == 0):
        message = (
            f"gram is zero: every input is zero in every token, or so small that squares "
            f"underflow (below {SMALLEST_SQUARE**0.5:.0e}): multiply the inputs by a power "
            f"of two"
        )
        raise InvalidProblemError(message)


def check_gram(gram: Tensor, noise: Tensor | None, slack: float) -> bool:
    """Raise unless it is a gram up to rounding; returns whether it is exactly symmetric.

    Parameters
    ----------
    gram
        Finite, shape (in, in).
    noise
        Rounding of the diagonal, (in,), in addition to the rounding of the gram.
    slack
        Rounding of the gram, relative to the diagonal.
    """
    diagonal = gram.diagonal()
    # the square of a channel far below the others may underflow in float32
    floor = torch.finfo(torch.float32).tiny * diagonal.max()
    root = (diagonal + (floor if noise is None else noise + floor)).sqrt()
    symmetric = True
    for rows in slabs(len(gram)):  # no copy of a large gram
        part, bound = gram[rows], torch.outer(root[rows], root)
        apart = (part - gram[:, rows].T).abs()
        symmetric = symmetric and not bool(apart.any())
        wrong = apart > slack * bound
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            row += rows.start
            message = (
                f"gram is not symmetric: {float(gram[row, column])} at ({row}, {column}), "
                f"{float(gram[column, row])} at ({column}, {row})"
            )
            raise InvalidProblemError(message)
        wrong = part.abs() > (1 + slack) * bound
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            row += rows.start
            message = (
                f"gram is not positive semi-definite: |G[{row}, {column}]| exceeds "
                f"sqrt(G[{row}, {row}] G[{column}, {column}])"
            )
            raise InvalidProblemError(message)
    return symmetric


def check_sums(sums: Tensor, name: str, rows: int) -> None:
    """Raise unless it is a vector of finite sums of squares, one per output row."""
    if tuple(sums.shape) != (rows,):
        message = (
            f"{name} has shape {tuple(sums.shape)}, expected ({rows},): one number per "
            f"output row"
        )
        raise InvalidProblemError(message)
    if not bool((sums >= 0).all() & torch.isfinite(sums).all()):
        message = f"{name} contains a negative or non-finite value"
        raise InvalidProblemError(message)


def largest_entry(matrix: Tensor) -> float:
    """Largest size of an entry."""
    return max(float(matrix[rows].abs().max()) for rows in slabs(len(matrix)))


def check_scale(weight: Tensor, gram: Tensor) -> None:
    """Raise if squares of the weights or outputs of a layer leave the range of float64."""
    largest = largest_entry(weight)
    outputs = largest * float(gram.diagonal().max()) ** 0.5
    smallest, limit = SMALLEST_SQUARE**0.5, SMALLEST_SQUARE**-0.5
    if largest == 0 or outputs == 0:
        return
    for name, size in (("weights", largest), ("outputs W X", outputs)):
        if not smallest < size < limit:
            verb = "underflow" if size < 1 else "overflow"
            message = (
                f"the {name} reach {size:.1e}, and squares of them {verb}: multiply the "
                f"weight by a power of two"
            )
            raise InvalidProblemError(message)


def check_vector(vector: Tensor, name: str, width: int) -> None:
    """Raise unless it is a finite vector (width,)."""
    if tuple(vector.shape) != (width,):
        message = f"{name} has shape {tuple(vector.shape)}, expected ({width},)"
        raise InvalidProblemError(message)
    wrong = ~torch.isfinite(vector)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        message = f"{name} contains {float(vector[index])} at channel {index}"
        raise InvalidProblemError(message)


def check_not_negative(vector: Tensor, name: str) -> None:
    """Raise if a vector of sums of squares has a negative entry."""
    if bool((vector < 0).any()):
        index = int(vector.argmin())
        message = f"{name} contains {float(vector[index])} at {index}, a sum of squares"
        raise InvalidProblemError(message)


def check_mean(mean: Tensor, gram: Tensor, name: str, slack: float) -> None:
    """Raise if the square of a mean exceeds the mean of the squares, up to rounding."""
    square, second = mean.square(), gram.diagonal()
    floor = torch.finfo(torch.float32).tiny * second.max()
    wrong = square > (1 + slack) * second + floor
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        message = (
            f"{name} is {float(mean[index]):g} at channel {index}, and its square exceeds "
            f"the mean of the squares, {float(second[index]):g}: they are not of the same "
            f"inputs"
        )
        raise InvalidProblemError(message)


def check_definite(gram: Tensor, slack: float) -> None:
    """Raise unless ``gram + slack * I`` is positive definite. Cost: O(in^3 / 3), float32.

    float32 fails for some grams that are positive; float64 decides.
    """
    for precision in (torch.float32, torch.float64):
        matrix = gram.to(precision, copy=True)
        matrix.diagonal().add_(slack)
        if int(torch.linalg.cholesky_ex(matrix)[1]) == 0:
            return
    message = (
        "gram is indefinite: some combination of the inputs has a negative mean square; it "
        "is not the gram of any inputs, or it has overflowed"
    )
    raise InvalidProblemError(message)

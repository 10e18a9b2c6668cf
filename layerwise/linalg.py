"""Damping, factorizations and eigenvalue bounds; all jitter of the toolkit lives here.

If a Cholesky factorization fails, it is tried again in steps: float32, then float64 at the
same damping, then float64 at ten times the damping, up to 1. The damping that succeeded is
part of the result. Nothing is clipped, and no other matrix takes the place of the gram.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise.chunks import slabs
from layerwise.errors import InvalidProblemError, SolveError
from layerwise.modes import without_autocast

FIRST_DAMPING = 1e-8  # tried after an undamped gram that is singular
POWER_ITERATIONS = 40
EXACT_WIDTH = 128
PROBES = 16


@contextmanager
def ieee_products() -> Iterator[None]:
    """Compute float32 products in full float32, whatever the program has allowed before.

    Shorter formats such as TF32 would silently make grams, residuals and exact refits wrong
    in the fourth digit. PyTorch has two interfaces to allow these formats, which refuse
    each other's settings. Both are restored at the end. Autocast is off meanwhile.
    """
    with without_autocast(), _without_short_formats():
        yield


@contextmanager
def _without_short_formats() -> Iterator[None]:
    backends: Any = torch.backends
    libraries = (backends.cuda.matmul, backends.mkldnn.matmul)
    before = [library.fp32_precision for library in libraries]
    if all(precision in ("ieee", "none") for precision in before):
        yield
        return
    older: str | None = None
    with suppress(RuntimeError):  # the program has used the newer interface
        older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # sets both interfaces
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for library, precision in zip(libraries, before, strict=True):
            library.fp32_precision = precision


@dataclass(frozen=True, eq=False)
class Factor:
    """Cholesky factor ``lower @ lower.T`` of ``gram + damping * mean_diagonal * I``.

    Parameters
    ----------
    lower
        Shape (in, in), lower triangular.
    damping
        The damping at which the factorization succeeded.
    requested
        The damping of the problem; smaller than `damping` if that had to be raised.
    """

    lower: Tensor
    damping: float
    requested: float

    @property
    def raised(self) -> bool:
        """Whether the damping had to be raised."""
        return self.damping > self.requested

    @cached_property
    def smallest_pivot(self) -> float:
        """Smallest pivot, relative to its diagonal entry before the elimination."""
        return float((self.lower.diagonal() / self.root).square().min())

    @cached_property
    def root(self) -> Tensor:
        """Square root of the diagonal of the damped gram, shape (in,)."""
        lengths: Tensor = torch.linalg.vector_norm(self.lower, dim=1)
        return lengths

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether a precision can represent the diagonal."""
        limits = torch.finfo(dtype)
        return float(self.root.min()) ** 2 > limits.tiny / limits.eps

    def holds_in(self, dtype: torch.dtype) -> bool:
        """Whether a precision can represent the diagonal and resolve the pivots."""
        rounding = torch.finfo(dtype).eps * len(self.lower)
        return self.fits(dtype) and self.smallest_pivot > rounding

    @cached_property
    def unit_inverse(self) -> tuple[float, float]:
        """Trace and squared norm of the inverse of the gram at unit diagonal.

        Exact up to width ``EXACT_WIDTH``, else estimated by ``PROBES`` vectors of random
        signs, which is enough to choose a method and not enough for a bound.
        """
        root, width = self.root, len(self.lower)
        if width <= EXACT_WIDTH:
            inverse = torch.cholesky_inverse(self.lower) * root * root[:, None]
            return float(inverse.trace()), float(inverse.square().sum())
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (PROBES, width), generator=generator)
        probes = (2.0 * signs - 1).to(root)
        images = self.solve_rows(probes * root) * root
        trace = (images * probes).sum(dim=1).mean()
        return float(trace), float(images.square().sum(dim=1).mean())

    @cached_property
    def unit_trace(self) -> float:
        """Trace of the inverse of the gram at unit diagonal.

        It is the squared norm of ``L^-1 D``, and no estimate, because certificates rest on
        it. Cost: O(in^3 / 3), as the factor, with a copy of some columns at a time.
        """
        total = self.root.new_zeros((), dtype=torch.float64)
        for columns in slabs(len(self.lower)):
            begin = columns.start
            part = self.root[columns].diag()
            below = len(self.lower) - columns.stop
            rhs = torch.nn.functional.pad(part, (0, 0, 0, below))
            lower = self.lower[begin:, begin:]
            solved = torch.linalg.solve_triangular(lower, rhs, upper=False)
            total += solved.square_().sum(dtype=torch.float64)
        return float(total)

    def solve_rows(self, rows: Tensor) -> Tensor:
        """``rows @ inverse`` for a matrix (m, in) of row vectors."""
        half = self._half_solved(rows)
        solved: Tensor = torch.linalg.solve_triangular(self.lower.T, half, upper=True)
        return solved.T.to(rows.dtype)

    def inverse_diagonal(self) -> Tensor:
        """Diagonal of the inverse, shape (in,)."""
        return torch.cholesky_inverse(self.lower).diagonal()

    def inverse_norms(self, rows: Tensor) -> Tensor:
        """``r inverse r^T`` of every row r of a matrix (m, in), shape (m,)."""
        return self._half_solved(rows).square_().sum(dim=0)

    def _half_solved(self, rows: Tensor) -> Tensor:  # (in, m)
        rhs = rows.to(self.lower.dtype).T
        half: Tensor = torch.linalg.solve_triangular(self.lower, rhs, upper=False)
        return half


def damped(
    gram: Tensor, mean_diagonal: float, damping: float, dtype: torch.dtype
) -> Tensor:
    """``gram + damping * mean_diagonal * I`` in the given precision."""
    result = gram.to(dtype, copy=True)
    result.diagonal().add_(damping * mean_diagonal)
    return result


def factorize(
    gram: Tensor, mean_diagonal: float, damping: float, dtype: torch.dtype
) -> Factor:
    """Factor the damped gram, with a larger damping where needed.

    Parameters
    ----------
    gram
        Shape (in, in), symmetric, float64.
    mean_diagonal
        Unit of damping.
    damping
        Damping to try first, relative; 0 means the gram itself.
    dtype
        Precision to try first; float64 follows.

    Raises
    ------
    SolveError
        If not even damping 1 gives a positive definite matrix: the gram is indefinite.
    """
    if damping < 0:
        message = f"damping must not be negative, got {damping}"
        raise InvalidProblemError(message)
    attempts = [(dtype, damping), (torch.float64, damping)]
    raised = damping
    while raised < 1:
        raised = max(FIRST_DAMPING, min(1.0, raised * 10))
        attempts.append((torch.float64, raised))
    for precision, tried in attempts:
        matrix = damped(gram, mean_diagonal, tried, precision)
        lower, info = torch.linalg.cholesky_ex(matrix)
        factor = Factor(lower, tried, damping)
        if int(info) == 0 and factor.holds_in(precision):
            return factor
    message = (
        "the gram is indefinite: its Cholesky factorization fails even at damping 1; "
        "check the calibration activations for overflow"
    )
    raise SolveError(message)


def largest_eigenvalue(matrix: Tensor) -> float:
    """Lower estimate of the largest eigenvalue of a positive semi-definite matrix.

    Power iteration from a fixed start. It is accurate to a few percent on ordinary grams,
    so a caller must allow for an estimate that is slightly too small.
    """
    return _power_iteration(lambda row: row @ matrix, matrix)


def smallest_eigenvalue(factor: Factor, scaling: Tensor) -> float:
    """Upper estimate of the smallest eigenvalue of ``S L L^T S``, S = diag(scaling)."""
    inverse = _power_iteration(
        lambda row: factor.solve_rows(row / scaling) / scaling, factor.lower
    )
    return 1 / inverse


def _power_iteration(apply: Callable[[Tensor], Tensor], like: Tensor) -> float:
    size = len(like)
    row = 1 + torch.arange(size, dtype=like.dtype, device=like.device) / size
    row = (row / row.norm()).unsqueeze(0)
    value = like.new_ones(())
    for _ in range(POWER_ITERATIONS):
        image = apply(row)
        value = image.norm()
        row = image / value
    return float(value)

r"""Splits of a gram into blocks and a remainder that is positive semi-definite.

.. math:: H = D + R, \qquad D \text{ block diagonal and positive}, \quad R \succeq 0

A problem with D alone separates into its blocks, and R can only increase its objective. So
the larger D, the better the lower bounds of :mod:`layerwise.lower_bounds`. A block has one
column, so that D is a diagonal, or the columns of a group of an n:m pattern.

For a diagonal D and the importance c of its entries, the best D solves a semidefinite
program, the dual of a relaxation of the max-cut kind. Its barrier problem

.. math:: \max_d\ \langle c, d\rangle + \nu \log\det(H - \operatorname{diag} d)

is solved by Newton's method [1]_: the gradient is ``c - nu diag(R^-1)``, and the Hessian is
``-nu`` times the entrywise square of ``R^-1``.

References
----------
.. [1] S. Benson, Y. Ye, X. Zhang, "Solving Large-Scale Sparse Semidefinite Programs for
   Combinatorial Optimization", SIAM J. Optimization 2000 (dual scaling).
"""

from typing import NamedTuple

import torch
from torch import Tensor

BARRIER = 0.3  # nu over the mean of c d
NEWTON_STEPS = 4
LENGTHS = (8, 4, 2, 1, 0.25, 0.06)  # of a step, times 1 / (1 + its Newton length)
SMALLEST_SHARE = 0.02  # share of its value that an entry keeps in a step, at least
SHARES = (1, 1 - 1e-6, 1 - 1e-4, 0.999, 0.99, 0.9, 0.5, 0.1, 0.01)  # of a split, tried
LANCZOS_STEPS = 40


def smallest_share(gram: Tensor, size: int) -> Tensor:
    """Split ``D = share * blocks of H`` with the largest share, shape (blocks, size, size).

    For one column per block, the share is the smallest eigenvalue of the gram scaled to a
    unit diagonal. The result is a little too large, or zero for a singular gram, so
    :func:`proven_split` must check it. Cost: O(in^3), one factorization.
    """
    blocks = _blocks_of(gram, size).clone()
    factors = torch.linalg.cholesky(blocks)
    half = _solve_blocks(factors, gram)
    share = _smallest_eigenvalue(_solve_blocks(factors, half.T))
    largest: Tensor = blocks * share
    return largest


def _smallest_eigenvalue(matrix: Tensor) -> Tensor:
    """Upper estimate of the smallest eigenvalue, by Lanczos steps on the inverse.

    Zero for a singular matrix.
    """
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        return matrix.new_zeros(())
    width, steps = len(matrix), min(LANCZOS_STEPS, len(matrix))
    row = 1 + torch.arange(width, dtype=matrix.dtype, device=matrix.device) / width
    basis = matrix.new_zeros(steps, width)
    projected = matrix.new_zeros(steps, steps)
    for step in range(steps):
        size = row.norm()
        for _ in range(2):  # orthogonal to all earlier rows, twice because of rounding
            row = row - (basis @ row) @ basis
        # a row in the span of the earlier ones becomes zero, without effect on `projected`
        length = row.norm()
        basis[step] = torch.where(length > 1e-10 * size, row / length, 0)
        row = torch.cholesky_solve(basis[step, :, None], lower)[:, 0]
        projected[:, step] = basis @ row
    largest: Tensor = torch.linalg.eigvalsh(projected, UPLO="U")[-1]
    return 1 / largest


def weighted_split(gram: Tensor, diagonal: Tensor, importance: Tensor) -> Tensor:
    """Diagonal D with a larger ``<c, d>``: Newton steps on its barrier problem.

    Parameters
    ----------
    gram
        H, shape (in, in), positive definite, float64.
    diagonal
        Start, with a positive definite remainder, shape (in,).
    importance
        c, shape (in,), positive.

    Returns
    -------
    Tensor
        Shape (in,), to be checked by :func:`proven_split`. Cost: O(in^3), an inverse and
        some factorizations per step.
    """
    barrier = _Barrier(gram, importance, BARRIER * (importance @ diagonal) / len(gram))
    current, best = diagonal, barrier.of(diagonal)
    for _ in range(NEWTON_STEPS):
        step, length = barrier.step(best)
        for scale in LENGTHS:
            trial = current + (scale / (1 + length)).clamp(max=1) * step
            trial = torch.maximum(trial, SMALLEST_SHARE * current)
            reached = barrier.of(trial)
            if bool(reached.value > best.value):  # NaN if the remainder is not positive
                current, best = trial, reached
                break
        else:
            break
    return current


class _Point(NamedTuple):
    value: Tensor  # (); NaN without a factor
    lower: Tensor  # of the remainder, (in, in)


class _Barrier:
    """``<c, d> + nu logdet(H - diag d)``."""

    def __init__(self, gram: Tensor, importance: Tensor, nu: Tensor) -> None:
        self._gram, self._importance, self._nu = gram, importance, nu

    def of(self, diagonal: Tensor) -> _Point:
        """Value at a diagonal, and the factor of its remainder."""
        rest = remainder(self._gram, diagonal[:, None, None])
        lower, info = torch.linalg.cholesky_ex(rest)
        value = self._importance @ diagonal + 2 * self._nu * lower.diagonal().log().sum()
        return _Point(torch.where(info == 0, value, torch.nan), lower)

    def step(self, point: _Point) -> tuple[Tensor, Tensor]:
        """Newton step, (in,), and its length; zeros where the Hessian is singular."""
        inverse = torch.cholesky_inverse(point.lower)
        slope = self._importance - self._nu * inverse.diagonal()
        lower, info = torch.linalg.cholesky_ex(inverse.square_().mul_(self._nu))
        step = torch.cholesky_solve(slope[:, None], lower)[:, 0]
        step = torch.where(info == 0, step, 0)
        return step, ((slope @ step) / self._nu).clamp(min=0).sqrt()


def proven_split(gram: Tensor, split: Tensor) -> Tensor | None:
    """Split, shrunk until its remainder is proven to be positive semi-definite.

    A Cholesky factorization that succeeds is exact for a matrix that differs by at most
    ``(in + 1) eps sqrt(r_ii r_jj)`` in its entries, so by ``in (in + 1) eps max(r_ii)`` in
    norm, with eps twice the unit of rounding. More than twice this norm is subtracted from
    the diagonal first, which also covers the rounding of ``H - D`` and of the gram's own
    diagonal. Success is then a proof. None if the gram itself is too close to singular, or
    D is not positive. The diagonal of `gram` should be near one.
    """
    width = len(gram)
    unit = torch.finfo(torch.float64).eps
    margin = 2 * (width + 1) ** 2 * unit * float(gram.diagonal().max())
    if not bool((split.diagonal(dim1=1, dim2=2) > 0).all()):  # NaN as well
        return None
    for share in SHARES:
        rest = remainder(gram, share * split)
        rest.diagonal().sub_(margin)
        if int(torch.linalg.cholesky_ex(rest)[1]) == 0:
            return share * split
    return None


def remainder(gram: Tensor, split: Tensor) -> Tensor:
    """``R = H - D``, a new tensor."""
    result = gram.clone()
    _blocks_of(result, split.shape[1]).sub_(split)
    return result


def _blocks_of(matrix: Tensor, size: int) -> Tensor:
    """View of the blocks on the diagonal."""
    step, stride = matrix.stride()
    return matrix.as_strided(
        (len(matrix) // size, size, size), (size * (step + stride), step, stride)
    )


def _solve_blocks(factors: Tensor, matrix: Tensor) -> Tensor:
    """``L^-1 M`` for a block diagonal L."""
    size = factors.shape[1]
    rows = matrix.reshape(-1, size, matrix.shape[1])
    solved: Tensor = torch.linalg.solve_triangular(factors, rows, upper=False)
    return solved.reshape(matrix.shape)

r"""Splits of a gram into blocks and a remainder that is positive semi-definite.

.. math:: H = D + R, \qquad D \text{ block diagonal and positive}, \quad R \succeq 0

A problem with D alone falls apart into its blocks, and R can only add to it: the larger D,
the better the lower bounds of :mod:`layerwise.lower_bounds`. Blocks have size 1, so that D
is a diagonal, or that of the groups of an n:m pattern.

Weighing D by C, how much each block counts, the best D solves a semidefinite program, the
dual of a relaxation of the max-cut kind. Its barrier problem

.. math:: \max_D\ \langle C, D\rangle + \nu \log\det(H - D)

has a closed form for one block at a time, and the inverse of R follows by products.
"""

import torch
from torch import Tensor

BARRIER = 1.0  # nu over the mean of <C, D> per column
SMALLEST_SHARE = 0.02  # of what a block could have is what it has at least
PANEL = 64  # columns that are updated together
SHARES = (1, 1 - 1e-6, 1 - 1e-4, 0.99, 0.9, 0.5, 0.1, 1e-2, 1e-4, 1e-8)  # of a split


def smallest_share(gram: Tensor, size: int) -> Tensor:
    """Split ``D = share * blocks of H`` with the largest share, shape (blocks, size, size).

    For one column per block it is the smallest eigenvalue of the gram scaled to a unit
    diagonal, times the diagonal. Cost: one eigenvalue decomposition.
    """
    blocks = diagonal_blocks(gram, size)
    factors = torch.linalg.cholesky(blocks)
    half = _solve_blocks(factors, gram)
    share = torch.linalg.eigvalsh(_solve_blocks(factors, half.T))[0]
    return blocks * (share * (1 - SMALLEST_SHARE)).clamp(min=0)


def weighted_split(gram: Tensor, split: Tensor, importance: Tensor) -> Tensor:
    """Split with a larger ``<C, D>``: one sweep over the blocks.

    Parameters
    ----------
    gram
        H, shape (in, in), positive definite, float64.
    split
        Where to start, with positive definite remainder, shape (blocks, size, size).
    importance
        C, shape (blocks, size, size), positive definite.

    Returns
    -------
    Tensor
        D, shape (blocks, size, size); a caller checks it by :func:`proven_split`.
        Cost: O(in^3).
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(remainder(gram, split)))
    size, found = split.shape[1], split.clone()
    nu = BARRIER * float((importance * split).sum()) / len(gram)
    step = max(1, PANEL // size) * size
    for begin in range(0, len(gram), step):
        own = slice(begin, min(begin + step, len(gram)))
        blocks = slice(own.start // size, own.stop // size)
        change = _update_panel(
            inverse[own, own].clone(), found[blocks], importance[blocks], nu
        )
        inverse = _inverse_after(inverse, own, change)
    return found


def _update_panel(inverse: Tensor, split: Tensor, importance: Tensor, nu: float) -> Tensor:
    """Best blocks one after the other, in place; the change of D as a matrix.

    Everything else fixed, a block may grow up to ``T = D + (inverse block)^-1``. In
    coordinates in which T is the identity the best D has the eigenvectors of C, and the
    eigenvalues ``1 - nu / c``.
    """
    size = split.shape[1]
    total = torch.zeros_like(inverse)
    for index in range(len(split)):
        own = slice(index * size, (index + 1) * size)
        room = split[index] + torch.linalg.inv(inverse[own, own])
        lower = torch.linalg.cholesky((room + room.T) / 2)
        values, vectors = torch.linalg.eigh(lower.T @ importance[index] @ lower)
        shares = (1 - nu / values).clamp(min=SMALLEST_SHARE)
        half = lower @ vectors
        change = (half * shares) @ half.T - split[index]
        split[index] += change
        total[own, own] = change
        inverse = _inverse_after(inverse, own, change)
    return total


def _inverse_after(inverse: Tensor, own: slice, change: Tensor) -> Tensor:
    """Inverse of R once `change` has moved from a diagonal block of R to D."""
    eye = torch.eye(len(change), dtype=change.dtype, device=change.device)
    core = torch.linalg.solve(eye - change @ inverse[own, own], change)
    updated: Tensor = inverse + inverse[:, own] @ core @ inverse[own, :]
    return updated


def proven_split(gram: Tensor, split: Tensor) -> Tensor | None:
    """Split shrunk until its remainder is positive semi-definite beyond rounding.

    A Cholesky factorization that succeeds is exact for a matrix that differs by at most
    ``(in + 1) eps sqrt(r_ii r_jj)`` in its entries, so by ``in (in + 1) eps max(r_ii)`` in
    norm. Twice that is taken from the diagonal first: success is then a proof. None if the
    gram itself is too close to singular. The diagonal of `gram` should be near one.
    """
    width = len(gram)
    unit = torch.finfo(torch.float64).eps
    margin = 2 * width * (width + 1) * unit * float(gram.diagonal().max())
    for share in SHARES:
        left = remainder(gram, share * split)
        left.diagonal().sub_(margin)
        if int(torch.linalg.cholesky_ex(left)[1]) == 0:
            return share * split
    return None


def remainder(gram: Tensor, split: Tensor) -> Tensor:
    """``R = H - D``, a new tensor."""
    result = gram.clone()
    _blocks_of(result, split.shape[1]).sub_(split)
    return result


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """Copy of the blocks on the diagonal, shape (blocks, size, size)."""
    return _blocks_of(gram, size).clone()


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

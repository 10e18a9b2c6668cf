r"""Splits of a gram into blocks and a remainder that is positive semi-definite.

.. math:: H = D + R, \qquad D \text{ block diagonal and positive}, \quad R \succeq 0

A problem with D alone falls apart into its blocks, and R can only add to it: the larger D,
the better the lower bounds of :mod:`layerwise.lower_bounds`. Blocks have size 1, so that D
is a diagonal, or that of the groups of an n:m pattern.

Weighing the entries of a diagonal D by c, how much each counts, the best D solves a
semidefinite program, the dual of a relaxation of the max-cut kind. Its barrier problem

.. math:: \max_d\ \langle c, d\rangle + \nu \log\det(H - \operatorname{diag} d)

has a closed form for one entry at a time, and the inverse of R follows by products.
"""

import torch
from torch import Tensor

BARRIER = 1.0  # nu over the mean of c d
SMALLEST_SHARE = 0.02  # of its room is what an entry has at least
PANEL = 64  # columns that are updated together
SHARES = (1, 1 - 1e-6, 1 - 1e-4, 0.99, 0.9, 0.5, 0.1, 0.01)  # of a split


def smallest_share(gram: Tensor, size: int) -> Tensor:
    """Split ``D = share * blocks of H`` with the largest share, shape (blocks, size, size).

    For one column per block it is the smallest eigenvalue of the gram scaled to a unit
    diagonal, times the diagonal. Cost: one eigenvalue decomposition.
    """
    blocks = _blocks_of(gram, size).clone()
    factors = torch.linalg.cholesky(blocks)
    half = _solve_blocks(factors, gram)
    share = torch.linalg.eigvalsh(_solve_blocks(factors, half.T))[0]
    largest: Tensor = blocks * share.clamp(min=0)
    return largest


def weighted_split(gram: Tensor, diagonal: Tensor, importance: Tensor) -> Tensor:
    """Diagonal D with a larger ``<c, d>``: one sweep over its entries.

    Everything else fixed, an entry d may grow to ``room = d + 1 / (R^-1)_jj``, and is best
    at ``room - nu / c``.

    Parameters
    ----------
    gram
        H, shape (in, in), positive definite, float64.
    diagonal
        Where to start, with positive definite remainder, shape (in,).
    importance
        c, shape (in,), positive.

    Returns
    -------
    Tensor
        Shape (in,); a caller checks it by :func:`proven_split`. Cost: O(in^3).
    """
    left = remainder(gram, diagonal[:, None, None])
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(left))
    nu = BARRIER * float(importance @ diagonal) / len(gram)
    found = diagonal.clone()
    for begin in range(0, len(gram), PANEL):
        own = slice(begin, begin + PANEL)
        panel = inverse[own, own].clone()
        for index in range(len(panel)):
            column = begin + index
            room = found[column] + 1 / panel[index, index]
            best = torch.maximum(room - nu / importance[column], SMALLEST_SHARE * room)
            change = best - found[column]
            found[column] = best
            scale = change / (1 - change * panel[index, index])
            panel += scale * torch.outer(panel[:, index], panel[index])
        # the same changes at once for the rest of the inverse
        change = (found - diagonal)[own]
        eye = torch.eye(len(change), dtype=gram.dtype, device=gram.device)
        core = torch.linalg.solve(eye - change[:, None] * inverse[own, own], change.diag())
        inverse = inverse + inverse[:, own] @ core @ inverse[own]
    return found


def proven_split(gram: Tensor, split: Tensor) -> Tensor | None:
    """Split shrunk until its remainder is positive semi-definite beyond rounding.

    A Cholesky factorization that succeeds is exact for a matrix that differs by at most
    ``(in + 1) eps sqrt(r_ii r_jj)`` in its entries, so by ``in (in + 1) eps max(r_ii)`` in
    norm. Twice that is taken from the diagonal first: success is then a proof. None if the
    gram itself is too close to singular, or D is not positive. The diagonal of `gram`
    should be near one.
    """
    width = len(gram)
    unit = torch.finfo(torch.float64).eps
    margin = 2 * width * (width + 1) * unit * float(gram.diagonal().max())
    if not bool((split.diagonal(dim1=1, dim2=2) > 0).all()):  # NaN as well
        return None
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

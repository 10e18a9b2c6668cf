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

import numpy as np
import torch
from torch import Tensor

BARRIER = 0.3  # nu over the mean of c d
SWEEPS = 2
SMALLEST_SHARE = 0.02  # of its room is what an entry has at least
PANEL = 64  # columns that are updated together
SHARES = (1, 1 - 1e-6, 1 - 1e-4, 0.999, 0.99, 0.9, 0.5, 0.1, 0.01)  # of a split
LANCZOS_STEPS = 40


def smallest_share(gram: Tensor, size: int) -> Tensor:
    """Split ``D = share * blocks of H`` with the largest share, shape (blocks, size, size).

    For one column per block it is the smallest eigenvalue of the gram scaled to a unit
    diagonal, times the diagonal. It comes out a little too large, or zero for a singular
    gram: :func:`proven_split` is to follow. Cost: O(in^3), one factorization.
    """
    blocks = _blocks_of(gram, size).clone()
    factors = torch.linalg.cholesky(blocks)
    half = _solve_blocks(factors, gram)
    share = _smallest_eigenvalue(_solve_blocks(factors, half.T))
    largest: Tensor = blocks * share
    return largest


def _smallest_eigenvalue(matrix: Tensor) -> Tensor:
    """Smallest eigenvalue from above, by Lanczos steps on the inverse; zero if singular."""
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        return matrix.new_zeros(())
    width, steps = len(matrix), min(LANCZOS_STEPS, len(matrix))
    row = 1 + torch.arange(width, dtype=matrix.dtype, device=matrix.device) / width
    basis = matrix.new_zeros(steps, width)
    projected = matrix.new_zeros(steps, steps)
    for step in range(steps):
        size = row.norm()
        for _ in range(2):  # against all rows before, twice for the sake of rounding
            row = row - (basis @ row) @ basis
        # a row within the span of those before leaves zero, and no trace in `projected`
        left = row.norm()
        basis[step] = torch.where(left > 1e-10 * size, row / left, 0)
        row = torch.cholesky_solve(basis[step, :, None], lower)[:, 0]
        projected[:, step] = basis @ row
    largest: Tensor = torch.linalg.eigvalsh(projected, UPLO="U")[-1]
    return 1 / largest


def weighted_split(gram: Tensor, diagonal: Tensor, importance: Tensor) -> Tensor:
    """Diagonal D with a larger ``<c, d>``: sweeps over its entries.

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
    for begin in list(range(0, len(gram), PANEL)) * SWEEPS:
        own = slice(begin, begin + PANEL)
        change = _panel_change(inverse[own, own], found[own], importance[own], nu)
        found[own] += change
        # the same changes at once for the rest of the inverse
        eye = torch.eye(len(change), dtype=gram.dtype, device=gram.device)
        core = torch.linalg.solve(eye - change[:, None] * inverse[own, own], change.diag())
        inverse = inverse.addmm(inverse[:, own] @ core, inverse[own])
    return found


def _panel_change(
    inverse: Tensor, diagonal: Tensor, importance: Tensor, nu: float
) -> Tensor:
    """Change of some entries of D, one after the other; all arguments are their parts.

    On the CPU, where a small step takes the least time, whatever the device.
    """
    panel = inverse.detach().cpu().numpy().copy()
    before, weights = diagonal.cpu().numpy(), importance.cpu().numpy()
    changes = np.zeros_like(before)
    for index in range(len(panel)):
        room = before[index] + 1 / panel[index, index]
        best = max(room - nu / weights[index], SMALLEST_SHARE * room)
        changes[index] = best - before[index]
        scale = changes[index] / (1 - changes[index] * panel[index, index])
        panel += scale * np.outer(panel[:, index], panel[index])
    return torch.from_numpy(changes).to(diagonal.device)


def proven_split(gram: Tensor, split: Tensor) -> Tensor | None:
    """Split shrunk until its remainder is positive semi-definite beyond rounding.

    A Cholesky factorization that succeeds is exact for a matrix that differs by at most
    ``(in + 1) eps sqrt(r_ii r_jj)`` in its entries, so by ``in (in + 1) eps max(r_ii)`` in
    norm, with eps twice the unit of rounding. More than twice that is taken from the
    diagonal first, which leaves room for the rounding of ``H - D`` and of the gram's own
    diagonal: success is then a proof. None if the gram itself is too close to singular, or
    D is not positive. The diagonal of `gram` should be near one.
    """
    width = len(gram)
    unit = torch.finfo(torch.float64).eps
    margin = 2 * (width + 1) ** 2 * unit * float(gram.diagonal().max())
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

"""Systems ``d_S G_SS = r_S`` of many rows by batched Cholesky factorizations.

A row is solved on its support S, or on the complement P if fewer weights are removed than
kept. The latter is the closed form of a joint removal: with ``y = r G^-1`` the answer is
``y - y_P [(G^-1)_PP]^-1 (G^-1)_P``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RowSolve = Callable[[Tensor], Tensor]  # residual (rows, in) -> change (rows, in)

LARGE_SYSTEM = 1024  # unknowns from which a GPU factors systems one by one


def solve_on_supports(
    gram: Tensor,  # (in, in)
    mask: Tensor,  # (rows, in)
) -> RowSolve:
    """Solver of ``d_S G_SS = r_S`` for all rows, each with its own support S.

    A batched Cholesky factorization of the gathered systems; shorter rows are padded with
    the identity.
    """
    width = len(gram)
    counts = mask.sum(dim=1)
    size = int(counts.amax())
    order = torch.argsort(~mask, dim=1, stable=True)[:, :size]  # kept indices first
    padding = torch.arange(size, device=mask.device) >= counts[:, None]
    index = order.masked_fill(padding, width)
    bordered = torch.nn.functional.pad(gram, (0, 1, 0, 1))
    # a single index: with two, a GPU makes copies of the size of the systems
    systems = bordered.take(index[:, :, None] * (width + 1) + index[:, None, :])
    systems.diagonal(dim1=1, dim2=2).add_(padding.to(gram.dtype))
    lower, info = _factors(systems)
    if bool((info > 0).any()):
        lower, info = _factors(systems.double())
        lower[info > 0] = torch.nan  # no certificate accepts the weights that follow
    del systems

    def correct(residuals: Tensor) -> Tensor:
        rhs = torch.nn.functional.pad(residuals, (0, 1)).gather(1, index)
        solved = torch.cholesky_solve(rhs[:, :, None].to(lower.dtype), lower)[:, :, 0]
        change = residuals.new_zeros(len(residuals), width + 1)
        change.scatter_(1, index, solved.to(residuals.dtype))
        inside: Tensor = change[:, :width]
        return inside

    return correct


def _factors(systems: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors, and which failed; on a GPU large systems are factored one by one.

    The batched routine of a GPU is made for small systems.
    """
    if systems.device.type != "cuda" or systems.shape[1] < LARGE_SYSTEM:
        lower, info = torch.linalg.cholesky_ex(systems)
        return lower, info
    return one_by_one(systems)


def one_by_one(systems: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factors of systems (rows, n, n), and which failed, (rows,)."""
    info = torch.empty(len(systems), dtype=torch.int32, device=systems.device)
    result = torch.empty_like(systems)
    for row, system in enumerate(systems):
        result[row], info[row] = torch.linalg.cholesky_ex(system)
    return result, info


def solve_on_complements(
    inverse: Tensor,  # (in, in)
    mask: Tensor,  # (rows, in)
) -> RowSolve:
    """Solver of the same systems from the inverse of the gram, O(removed^3 / 3) per row."""
    pull = solve_on_supports(inverse, ~mask)

    def correct(residuals: Tensor) -> Tensor:
        free = residuals @ inverse.to(residuals.dtype)
        bound = pull(free) @ inverse.to(residuals.dtype)
        return torch.where(mask, free - bound, 0)

    return correct

r"""Rows reduced to their undecided entries: small problems with the same differences.

Of the entries of a row, most kept ones surely stay and most removed ones surely stay away.
Let K be the kept entries that stay and E the undecided ones. With the weights on K always
optimal, the damped objective is a quadratic function of the weights u on E alone,

.. math:: f(u) = c - 2 t u + u M u, \quad M = G_{EE} - G_{EK} G_{KK}^{-1} G_{KE} .

So a row that keeps any D inside of E has the minimum ``c - t_D M_DD^-1 t_D``: the masks on
E are compared exactly, in a problem of width ``|E|``. The reduction costs one
factorization O(kept^3 / 3) a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.chunks import slabs
from layerwise.patterns import NM, Pattern
from layerwise.problem import LayerProblem
from layerwise.solvers.refit.rounds import inner_precision

PART_BYTES = 1 << 22  # systems that are factored together on a processor
ARRAYS = 4  # of the size of a system, in memory at the same time


@dataclass(frozen=True, eq=False)
class Undecided:
    """Small problems of some rows, float64; a slot contains an entry or is free.

    Parameters
    ----------
    index
        Columns of the slots, `in` for free ones, shape (rows, slots).
    matrix
        M, shape (rows, slots, slots); the identity on free slots.
    target
        t, shape (rows, slots).
    gain
        How much the optimal weights on the mask lower the objective, shape (rows,).
    """

    index: Tensor
    matrix: Tensor
    target: Tensor
    gain: Tensor


def choose_undecided(
    pattern: Pattern,
    weight: Tensor,  # (rows, in), float64
    mask: Tensor,  # (rows, in)
    residual: Tensor,  # (rows, in), float64
    bound: Tensor,  # (in,), diagonal of the inverse of the gram
    count: int,
) -> Tensor:  # (rows, 2 * slots), kept entries before removed ones
    """Columns of the entries most likely to change; `in` for free slots.

    ``w_j^2 / [G^-1]_jj`` bounds the cost of removing j from below, and
    ``r_q^2 [G^-1]_qq`` the gain of adding q from above. At most `count` kept and `count`
    removed entries are taken: for n:m in whole groups, those with the best difference.
    """
    cost = torch.where(mask, weight.square() / bound, torch.inf)
    gain = torch.where(mask, -torch.inf, residual.square() * bound)
    width = mask.shape[1]
    if isinstance(pattern, NM):
        shape = (len(mask), width // pattern.m, pattern.m)
        cheapest = cost.view(shape).amin(dim=2)
        promise = gain.view(shape).amax(dim=2) - cheapest
        groups = max(1, min(2 * count // pattern.m, shape[1]))
        chosen = promise.topk(groups, dim=1).indices[:, :, None] * pattern.m
        index = (chosen + torch.arange(pattern.m, device=mask.device)).flatten(1)
        order = torch.argsort(~mask.gather(1, index), dim=1, stable=True)
        return index.gather(1, order)
    count = min(count, width)
    leaving, entering = cost.topk(count, dim=1, largest=False), gain.topk(count, dim=1)
    return torch.cat(
        [
            leaving.indices.masked_fill(leaving.values == torch.inf, width),
            entering.indices.masked_fill(entering.values == -torch.inf, width),
        ],
        dim=1,
    )


class Reduction:
    """The damped gram of a layer, prepared to reduce rows.

    Parameters
    ----------
    problem
        The layer, at the damping at which its gram factors.
    """

    def __init__(self, problem: LayerProblem) -> None:
        self._gram = problem.damped_gram(torch.float64)
        self._precision = inner_precision(problem)
        self._rounded = torch.nn.functional.pad(
            self._gram.to(self._precision), (0, 1, 0, 1)
        )

    @staticmethod
    def row_bytes(kept: int, slots: int) -> int:
        """Bytes of one row: its system in float64, and the small problem of its search."""
        return 8 * ARRAYS * (kept**2 + kept * slots + 2 * slots**2)

    def of(
        self,
        weight: Tensor,  # (rows, in), float64
        mask: Tensor,  # (rows, in)
        residual: Tensor,  # (rows, in), float64
        index: Tensor,  # (rows, slots)
    ) -> Undecided:
        """Reduce rows to the slots of `index`.

        Rows whose systems do not factor get NaN, so that no change improves them.
        """
        width = mask.shape[1]
        undecided = torch.zeros(len(mask), width + 1, dtype=torch.bool, device=mask.device)
        undecided.scatter_(1, index, True)
        stays = mask & ~undecided[:, :width]
        most = max(1, int(stays.sum(dim=1).amax()))
        at_once = len(mask)
        if mask.device.type == "cpu":
            at_once = max(1, PART_BYTES // (most**2 * self._precision.itemsize))
        padded = torch.nn.functional.pad(residual, (0, 1))
        parts = [
            self._part(stays[rows], padded[rows], index[rows])
            for rows in slabs(len(mask), at_once)
        ]
        small, rest, gain = (torch.cat(part) for part in zip(*parts, strict=True))
        on = torch.nn.functional.pad(weight, (0, 1)).gather(1, index)
        target = rest + (small @ on[:, :, None])[:, :, 0]
        return Undecided(index, small, target, gain.nan_to_num(nan=0.0))

    def _part(
        self, stays: Tensor, residual: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """M, the residual on E with optimal weights on K, and what these gain."""
        width, slots = len(self._gram), index.shape[1]
        counts = stays.sum(dim=1, keepdim=True)
        size = int(counts.amax())
        order = torch.argsort(~stays, dim=1, stable=True)[:, :size]
        free = torch.arange(size, device=stays.device) >= counts
        kept = order.masked_fill(free, width)
        rows = self._rounded[kept]  # (rows, size, in + 1)
        shape = (-1, size, -1)
        systems = rows.gather(2, kept[:, None, :].expand(shape))
        systems.diagonal(dim1=1, dim2=2).add_(free.to(systems.dtype))
        across = rows.gather(2, index[:, None, :].expand(shape))
        rhs = residual.gather(1, kept)[:, :, None].to(systems.dtype)
        lower, info = torch.linalg.cholesky_ex(systems)
        lower[info > 0] = torch.nan
        half = torch.linalg.solve_triangular(
            lower, torch.cat([across, rhs], dim=2), upper=False
        )
        pull = (half[:, :, :slots].mT @ half).double()
        bordered = torch.nn.functional.pad(self._gram, (0, 1, 0, 1))
        small = bordered[index[:, :, None], index[:, None, :]] - pull[:, :, :slots]
        small = (small + small.mT) / 2
        small.diagonal(dim1=1, dim2=2).add_((index == width).double())
        rest = residual.gather(1, index) - pull[:, :, slots]
        return small, rest, half[:, :, slots].double().square().sum(dim=1)

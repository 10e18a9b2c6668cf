r"""One set of kept columns for all rows, always refitted exactly while it changes.

Let K be the kept columns and R the others, G the damped gram, V the weights that are
optimal on K and ``r = T - V G`` their residual. A *unit* U is a set of columns that are
kept or removed together. The cost of every change follows from two (in, in) matrices,

.. math:: H = \begin{pmatrix} -A & A\,G_{KR} \\ \cdot & G_{RR} - G_{RK}\,A\,G_{KR}
          \end{pmatrix},\quad A = (G_{KK})^{-1}, \qquad Q = Z^\top Z,

where Z (out, in) contains V in the kept and r in the removed columns. Then, exactly,

- flipping U, from kept to removed or back, changes the objective by
  ``-tr(Q_UU H_UU^-1)``: a loss where U was kept, a gain where it was not;
- H and Q follow by the sweep operator [1]_ with the pivot ``H_UU``, an update of rank
  ``|U|`` and ``2 |U|``. Z itself is never needed, so a step is O(in^2 |U|) for any number
  of rows. These updates are collected (:mod:`layerwise.solvers.column.delayed`), so that
  they run as products of matrices.

References
----------
.. [1] J. H. Goodnight, "A Tutorial on the SWEEP Operator", The American Statistician 1979
   (regressions with variables that enter and leave).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.certificates import least_squares_minimum
from layerwise.problem import LayerProblem
from layerwise.solvers.column.delayed import DelayedMatrix, blocks_of

REFRESH_SHARE = 4  # start anew after this share of the columns returned: rounding adds up


@dataclass(frozen=True, eq=False)
class Exchanges:
    """Removed units, each with the best kept unit to exchange it for, cheapest first.

    Parameters
    ----------
    entering, leaving
        Units, shape (candidates,).
    change
        Change of the objective by each exchange alone, shape (candidates,), ascending.
    """

    entering: Tensor
    leaving: Tensor
    change: Tensor


class ColumnSupport:
    """Kept columns of a layer in units, initially all of them; everything is float64.

    Parameters
    ----------
    problem
        The layer; its damping is raised if its gram does not factor.
    units
        Unit of each column, shape (in,), consecutive integers from 0.
    """

    def __init__(self, problem: LayerProblem, units: Tensor) -> None:
        weight, factor = problem.weight.double(), problem.factor(torch.float64)
        problem = problem.with_damping(factor.damping)
        if problem.shift is not None:
            weight = weight + factor.solve_rows(problem.shift)
        self._full = -torch.cholesky_inverse(factor.lower), weight.T @ weight
        minimum = least_squares_minimum(problem).clamp(min=0)
        self._minimum = self.objective = float(minimum.sum())
        self._columns = _columns_of(units)
        self._swept, self._products = (DelayedMatrix(m, self._columns) for m in self._full)
        every = torch.ones(len(self._columns), dtype=torch.bool, device=units.device)
        self.kept, self._returned = every, 0

    @property
    def unit_size(self) -> int:
        """Columns of the largest unit."""
        return self._columns.shape[1]

    def restart(self, kept: Tensor) -> None:
        """Keep exactly these units, shape (units,), by one flip from the full set."""
        for current, full in zip((self._swept, self._products), self._full, strict=True):
            current.reset(full)
        self.kept, self.objective = torch.ones_like(kept), self._minimum
        self._flip((~kept).nonzero()[:, 0])
        self._returned = 0

    def changes(self) -> Tensor:
        """Change of the damped objective by flipping each unit alone, shape (units,)."""
        pivot, inner = self._swept.diagonal.clone(), self._products.diagonal
        return _change(pivot, inner, self._columns == len(self._swept))

    def flip(self, units: Tensor) -> float:
        """Flip units that are all kept or all removed; return the objective's change."""
        before = self.objective
        self._flip(units)
        if self._returned * REFRESH_SHARE > len(self._swept):
            self.restart(self.kept)
        return self.objective - before

    def _flip(self, units: Tensor) -> None:
        if len(units) == 0:
            return
        leaving = bool(self.kept[units[0]])
        assert bool((self.kept[units] == leaving).all())
        sign = -1.0 if leaving else 1.0
        columns = self._columns[units].flatten()
        columns = columns[columns < len(self._swept)]
        swept, crossed = self._swept.rows(columns), self._products.rows(columns)
        inverse, inner = torch.linalg.inv(swept[:, columns]), crossed[:, columns]
        share = inverse @ swept  # (pivot, in)
        half = crossed - inner @ share / 2
        self._swept.subtract(swept, share)
        self._products.subtract(torch.cat([share, half]), torch.cat([half, share]))
        crossed = sign * inverse @ (crossed - inner @ share)
        share = sign * share
        share[:, columns], crossed[:, columns] = -inverse, inverse @ inner @ inverse
        self._swept.replace(units, columns, share)
        self._products.replace(units, columns, crossed)
        self.objective -= float((inner * inverse).sum())
        self.kept = self.kept.clone()
        self.kept[units] ^= True
        self._returned += 0 if leaving else len(columns)

    def exchanges(self, entering: Tensor, heads: Tensor) -> Exchanges:
        """Best exchange of each of some removed units for a kept unit of the same head.

        Parameters
        ----------
        entering
            Removed units, shape (candidates,).
        heads
            Head of each unit, shape (units,).
        """
        leaving = self.kept.nonzero()[:, 0]
        into, out = self._columns[entering], self._columns[leaving]
        swept, products = self._swept.settled(), self._products.settled()
        pivot, inner = blocks_of(swept, into, into), blocks_of(products, into, into)
        _pad(pivot, into == len(swept))
        inverse = torch.linalg.inv(pivot)
        gain = (inner * inverse).sum(dim=(1, 2))
        # blocks of all pairs once the removed unit is kept: (candidates, kept, size, size)
        pairs = into[:, None], out[None]
        share = _product(inverse[:, None], blocks_of(swept, *pairs))
        mixed = _product(share.mT, blocks_of(products, *pairs))
        pivots = _product(share.mT, _product(pivot[:, None], share))
        pivots = blocks_of(swept, out, out) - pivots
        inners = _product(share.mT, _product(inner[:, None], share)) - mixed - mixed.mT
        inners = blocks_of(products, out, out) + inners
        change = _change(pivots, inners, out == len(swept)) - gain[:, None]
        other_head = heads[entering][:, None] != heads[leaving]
        best = change.masked_fill(other_head, torch.inf).min(dim=1)
        order = best.values.argsort(stable=True)
        return Exchanges(entering[order], leaving[best.indices][order], best.values[order])


def _change(pivot: Tensor, inner: Tensor, padding: Tensor) -> Tensor:
    """``-tr(inner pivot^-1)`` of many blocks (..., size, size)."""
    if pivot.shape[-1] == 1:
        return -(inner / pivot)[..., 0, 0]
    _pad(pivot, padding)
    solved: Tensor = torch.linalg.solve(pivot, inner)
    return -solved.diagonal(dim1=-2, dim2=-1).sum(dim=-1)


def _pad(pivot: Tensor, padding: Tensor) -> None:
    """Add ones on the diagonal where a unit has fewer columns than the largest."""
    pivot.diagonal(dim1=-2, dim2=-1).add_(padding.to(pivot.dtype))


def _product(first: Tensor, second: Tensor) -> Tensor:
    """Products of many square blocks (..., size, size)."""
    return first * second if first.shape[-1] == 1 else first @ second


def _columns_of(units: Tensor) -> Tensor:
    """Columns of each unit, shape (units, size); padded by the index one past the end."""
    counts = torch.bincount(units)
    order = units.argsort(stable=True)
    slot = torch.arange(len(units), device=units.device)
    slot = slot - (counts.cumsum(0) - counts)[units[order]]
    shape = (len(counts), int(counts.max()))
    columns = torch.full(shape, len(units), device=units.device)
    columns[units[order], slot] = order
    return columns

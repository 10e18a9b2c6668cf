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
  of rows.

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

REFRESH_SHARE = 4  # start anew after a quarter of the columns flipped: rounding adds up


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
        self._swept, self._products = (matrix.clone() for matrix in self._full)
        minimum = least_squares_minimum(problem).clamp(min=0)
        self._minimum = self.objective = float(minimum.sum())
        self._columns = _columns_of(units)
        every = torch.ones(len(self._columns), dtype=torch.bool, device=units.device)
        self.kept, self._flipped = every, 0

    @property
    def unit_size(self) -> int:
        """Columns of the largest unit."""
        return self._columns.shape[1]

    def restart(self, kept: Tensor) -> None:
        """Keep exactly these units, shape (units,), by one flip from the full set."""
        for current, full in zip((self._swept, self._products), self._full, strict=True):
            current.copy_(full)
        self.kept, self.objective = torch.ones_like(kept), self._minimum
        self._flip((~kept).nonzero()[:, 0])
        self._flipped = 0

    def changes(self) -> Tensor:
        """Change of the damped objective by flipping each unit alone, shape (units,)."""
        pivot = _blocks(self._swept, self._columns, self._columns)
        inner = _blocks(self._products, self._columns, self._columns)
        return _change(pivot, inner, self._columns == len(self._swept))

    def flip(self, units: Tensor) -> float:
        """Flip units that are all kept or all removed; return the objective's change."""
        before = self.objective
        self._flip(units)
        if self._flipped * REFRESH_SHARE > len(self._swept):
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
        inverse = torch.linalg.inv(self._swept[columns[:, None], columns])
        inner = self._products[columns[:, None], columns]
        share = inverse @ self._swept[columns]  # (pivot, in)
        crossed = self._products[columns]
        half = crossed - inner @ share / 2
        self._swept.addmm_(self._swept[columns].T, share, alpha=-1)
        outer, other = torch.cat([share, half]), torch.cat([half, share])
        self._products.addmm_(outer.T, other, alpha=-1)
        crossed = sign * inverse @ (crossed - inner @ share)
        self._swept[columns], self._swept[:, columns] = sign * share, sign * share.T
        self._swept[columns[:, None], columns] = -inverse
        self._products[columns], self._products[:, columns] = crossed, crossed.T
        self._products[columns[:, None], columns] = inverse @ inner @ inverse
        self.objective -= float((inner * inverse).sum())
        self.kept = self.kept.clone()
        self.kept[units] ^= True
        self._flipped += len(columns)

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
        pivot, inner = _blocks(self._swept, into, into), _blocks(self._products, into, into)
        _pad(pivot, into == len(self._swept))
        inverse = torch.linalg.inv(pivot)
        gain = (inner * inverse).sum(dim=(1, 2))
        # blocks of all pairs once the removed unit is kept: (candidates, kept, size, size)
        pairs = into[:, None], out[None]
        share = inverse[:, None] @ _blocks(self._swept, *pairs)
        mixed = share.mT @ _blocks(self._products, *pairs)
        pivots = _blocks(self._swept, out, out) - share.mT @ pivot[:, None] @ share
        inners = _blocks(self._products, out, out) - mixed - mixed.mT
        inners = inners + share.mT @ inner[:, None] @ share
        change = _change(pivots, inners, out == len(self._swept)) - gain[:, None]
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


def _blocks(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Blocks (..., size, size) of a matrix; zero where an index is one past its end."""
    last = len(matrix) - 1
    blocks = matrix[
        rows.clamp(max=last)[..., :, None], columns.clamp(max=last)[..., None, :]
    ]
    outside = (rows > last)[..., :, None] | (columns > last)[..., None, :]
    return blocks.masked_fill_(outside, 0)


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

r"""Rows of a layer whose supports change one entry at a time, always refitted exactly.

For a row with support S, let ``A = (G_SS)^-1`` with the damped gram G, let w be the optimal
weights on S, and ``r = T - w G`` the residual. Then, exactly,

- removing j costs ``w_j^2 / A_jj``;
- adding q gains ``r_q^2 / s`` with ``v = A G_Sq`` and ``s = G_qq - G_qS v``;
- adding q and removing j at once changes the objective by

.. math:: \frac{(w_j - v_j r_q / s)^2}{A_{jj} + v_j^2 / s} - \frac{r_q^2}{s}.

The inverse and the weights follow by updates of rank one or two, O(kept^2) a row.

References
----------
.. [1] B. Hassibi, D. Stork, "Second Order Derivatives for Network Pruning: Optimal Brain
   Surgeon", NIPS 1992, equation 5 (removal; addition is its inverse).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import MemoryBudgetError
from layerwise.problem import LayerProblem

COPIES = 4  # of the inverses, in memory at the same time during an update
ARRAYS = 6  # of shape (candidates, slots), in memory during a comparison of exchanges


@dataclass(frozen=True, eq=False)
class Entries:
    """Candidate entries to add to every row, with the effect of adding them.

    Parameters
    ----------
    index
        Columns of the candidates, shape (rows, candidates).
    effect
        ``v``, shape (rows, candidates, slots).
    schur
        ``s``, shape (rows, candidates); infinite where the entry is kept already.
    rest
        ``r_q``, shape (rows, candidates).
    """

    index: Tensor
    effect: Tensor
    schur: Tensor
    rest: Tensor

    def of(self, rows: Tensor) -> "Entries":
        """Return the entries of some of the rows."""
        return Entries(
            self.index[rows], self.effect[rows], self.schur[rows], self.rest[rows]
        )

    @property
    def gains(self) -> Tensor:
        """Decrease of the objective by adding each entry alone, (rows, candidates)."""
        return self.rest.square() / self.schur


class Supports:
    """Supports of many rows in slots; a slot contains a column or is free.

    Parameters
    ----------
    problem
        The layer, at the damping that is used.
    rows
        Indices of the rows that this object works on.
    mask
        Their supports, shape (rows, in), True = kept.
    spare
        Free slots of a row beyond the largest support.

    Notes
    -----
    Weights and inverses of free slots are zero up to rounding. Their column is `in`, one
    past the end, where the gram has a border of zeros. Everything is float64, because the
    errors of many updates add up.
    """

    def __init__(
        self, problem: LayerProblem, rows: Tensor, mask: Tensor, spare: int = 0
    ) -> None:
        width = problem.shape[1]
        self.gram = torch.nn.functional.pad(
            problem.damped_gram(torch.float64), (0, 1, 0, 1)
        )
        self.width = width
        self._dense = problem.weight[rows].double()
        self._shift = None if problem.shift is None else problem.shift[rows]
        self._drift = problem.drift[rows]
        size = min(int(mask.sum(dim=1).amax()) + spare, width)
        order = torch.argsort(~mask, dim=1, stable=True)[:, :size]
        free = torch.arange(size, device=mask.device) >= mask.sum(dim=1, keepdim=True)
        self.index = order.masked_fill(free, width)
        self.mask = mask.clone()
        self.inverse = self._inverses(free)
        self.weight = torch.nn.functional.pad(self._dense, (0, 1)).gather(1, self.index)
        every = torch.arange(len(mask), device=mask.device)
        rhs = torch.nn.functional.pad(self.residual(every), (0, 1)).gather(1, self.index)
        self.weight = self.weight + (self.inverse @ rhs[:, :, None])[:, :, 0]

    def _inverses(self, free: Tensor) -> Tensor:
        """Inverse of the gram on every support, computed once if all supports are full."""
        same = self.index.shape[1] == self.width and not bool(free.any())
        index = self.index[:1] if same else self.index
        padding = free[: len(index)].double()
        systems = self.gram[index[:, :, None], index[:, None, :]]
        systems.diagonal(dim1=1, dim2=2).add_(padding)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(systems))
        inverse.diagonal(dim1=1, dim2=2).sub_(padding)
        return inverse.expand(len(free), -1, -1).contiguous()

    @staticmethod
    def row_bytes(slots: int, candidates: int = 0) -> int:
        """Bytes of one row, with the arrays of its exchanges."""
        return 8 * slots * (COPIES * slots + ARRAYS * candidates)

    @staticmethod
    def chunk(slots: int, memory_budget: int, candidates: int = 0) -> int:
        """Number of rows that fit a memory budget."""
        per_row = Supports.row_bytes(slots, candidates)
        if per_row > memory_budget:
            message = (
                f"the inverse of one row and its updates need {per_row} bytes, the "
                f"memory budget is {memory_budget}; raise it or use another method"
            )
            raise MemoryBudgetError(message)
        return int(memory_budget // per_row)

    def dense(self, rows: Tensor) -> Tensor:
        """Weights of some rows, shape (rows, in)."""
        result = self._dense.new_zeros(len(rows), self.width + 1)
        result.scatter_(1, self.index[rows], self.weight[rows])
        return result[:, : self.width]

    def objective(self) -> Tensor:
        """Damped objective of every row, shape (rows,)."""
        change = self._dense - self.dense(
            torch.arange(len(self.mask), device=self.mask.device)
        )
        gradient = change @ self.gram[: self.width, : self.width]
        if self._shift is not None:
            gradient += 2 * self._shift
        return ((gradient * change).sum(dim=1) + self._drift).clamp(min=0)

    def residual(self, rows: Tensor) -> Tensor:
        """``T - w G`` of some rows, shape (rows, in)."""
        change = self._dense[rows] - self.dense(rows)
        result = change @ self.gram[: self.width, : self.width]
        return result if self._shift is None else result + self._shift[rows]

    def _every(self, rows: Tensor) -> bool:
        """Whether these are all rows in order: then no inverse needs to be copied."""
        return len(rows) == len(self.inverse) and bool((rows.diff() > 0).all())

    def _diagonal(self, rows: Tensor) -> Tensor:
        diagonal = self.inverse.diagonal(dim1=1, dim2=2)[rows]
        return diagonal.masked_fill(self.index[rows] == self.width, 0)

    def removal_costs(self, rows: Tensor) -> Tensor:
        """Cost of removing each kept entry, (rows, slots); infinite for free slots."""
        diagonal = self._diagonal(rows)
        cost = self.weight[rows].square() / diagonal
        return torch.where(diagonal > 0, cost, torch.inf)

    def entries(self, rows: Tensor, bound: Tensor, count: int) -> Entries:
        """Removed entries of some rows with the largest bounds on their gains.

        Parameters
        ----------
        rows
            Rows of this object.
        bound
            Upper bound on ``1 / s`` of every column, shape (in,).
        count
            Number of entries per row.
        """
        residual = self.residual(rows)
        promise = residual.square() * bound
        promise = promise.masked_fill(self.mask[rows], -1)
        index = promise.topk(min(count, self.width), dim=1).indices
        columns = self.gram[index[:, :, None], self.index[rows][:, None, :]]
        effect = columns @ (self.inverse if self._every(rows) else self.inverse[rows])
        schur = self.gram.diagonal()[index] - (effect * columns).sum(dim=2)
        kept = self.mask[rows].gather(1, index)
        schur = schur.masked_fill(kept | (schur <= 0), torch.inf)
        return Entries(index, effect, schur, residual.gather(1, index))

    def exchanges(self, rows: Tensor, entries: Entries) -> Tensor:
        """Change of the objective by every exchange, (rows, candidates, slots).

        Infinite where a slot is free or a candidate is kept already.
        """
        schur = entries.schur[:, :, None]
        weight = self.weight[rows][:, None, :] - entries.effect * (
            entries.rest[:, :, None] / schur
        )
        diagonal = self._diagonal(rows)[:, None, :]
        grown = diagonal + entries.effect.square() / schur
        change = weight.square() / grown - entries.gains[:, :, None]
        possible = (diagonal > 0) & torch.isfinite(schur)
        return torch.where(possible, change, torch.inf)

    def exchange(
        self, rows: Tensor, entries: Entries, chosen: Tensor, slot: Tensor
    ) -> None:
        """Add one entry and remove another in each of some rows.

        Parameters
        ----------
        rows
            Rows that change; `entries` belongs to the same rows.
        entries
            From :meth:`entries`.
        chosen, slot
            Candidate to add, and slot of the entry that it replaces, per row.
        """
        at = torch.arange(len(rows), device=rows.device)
        entering, schur = entries.index[at, chosen], entries.schur[at, chosen][:, None]
        effect, step = entries.effect[at, chosen], entries.rest[at, chosen][:, None] / schur
        inverse, weight = self.inverse[rows], self.weight[rows] - effect * step
        # the inverse bordered by the entry, whose column of the inverse is -effect / schur
        pivot_row = inverse[at, slot] + effect * (effect[at, slot][:, None] / schur)
        pivot, border = pivot_row[at, slot][:, None], -effect / schur
        crossing = border[at, slot][:, None]
        left = torch.stack([effect / schur, -pivot_row / pivot], dim=2)
        right = torch.stack([effect, pivot_row], dim=1)
        inverse.baddbmm_(left, right)
        border = border - pivot_row * (crossing / pivot)
        border[at, slot] = (1 / schur - crossing.square() / pivot)[:, 0]
        inverse[at, slot], inverse[at, :, slot] = border, border
        share = weight[at, slot][:, None] / pivot
        weight = weight - pivot_row * share
        weight[at, slot] = (step - crossing * share)[:, 0]
        self.mask[rows, self.index[rows, slot]] = False
        self.mask[rows, entering] = True
        self.index[rows, slot] = entering
        self.inverse[rows], self.weight[rows] = inverse, weight

    def add(self, rows: Tensor, entries: Entries, chosen: Tensor) -> None:
        """Add one entry to each of some rows, which must have a free slot."""
        at = torch.arange(len(rows), device=rows.device)
        entering, schur = entries.index[at, chosen], entries.schur[at, chosen][:, None]
        effect, step = entries.effect[at, chosen], entries.rest[at, chosen][:, None] / schur
        slot = (self.index[rows] == self.width).long().argmax(dim=1)
        inverse, weight = self.inverse[rows], self.weight[rows] - effect * step
        inverse.baddbmm_((effect / schur)[:, :, None], effect[:, None, :])
        border = -effect / schur
        border[at, slot] = 1 / schur[:, 0]
        inverse[at, slot], inverse[at, :, slot] = border, border
        weight[at, slot] = step[:, 0]
        self.mask[rows, entering] = True
        self.index[rows, slot] = entering
        self.inverse[rows], self.weight[rows] = inverse, weight

    def remove(self, rows: Tensor, slot: Tensor) -> None:
        """Remove one entry of each of some rows: the step of optimal brain surgeon."""
        at = torch.arange(len(rows), device=rows.device)
        every = self._every(rows)
        inverse = self.inverse if every else self.inverse[rows]
        weight = self.weight[rows]
        pivot_row = inverse[at, slot]
        scaled = pivot_row / pivot_row[at, slot][:, None]
        weight = weight - weight[at, slot][:, None] * scaled
        inverse.baddbmm_(scaled[:, :, None], pivot_row[:, None, :], alpha=-1)
        weight[at, slot] = 0  # exactly; the inverse keeps some rounding in this slot
        self.mask[rows, self.index[rows, slot]] = False
        self.index[rows, slot] = self.width
        self.weight[rows] = weight
        if not every:
            self.inverse[rows] = inverse

    def compact(self) -> None:
        """Drop slots that are free in every row."""
        size = int((self.index < self.width).sum(dim=1).amax())
        free = (self.index == self.width).long()
        order = torch.argsort(free, dim=1, stable=True)[:, :size]
        at = torch.arange(len(order), device=order.device)[:, None, None]
        self.inverse = self.inverse[at, order[:, :, None], order[:, None, :]]
        self.index, self.weight = self.index.gather(1, order), self.weight.gather(1, order)

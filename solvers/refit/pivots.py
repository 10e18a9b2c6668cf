r"""Exchanges in small problems by pivots: O(slots^2) a row and exchange.

For a row with the problem ``u M u - 2 t u`` and a set D of kept slots, the tableau is the
principal pivot transform of the bordered matrix ``[M t; t 0]`` on D. With ``A = M_DD^-1``
and C the other slots it contains ``-A``, ``V = A M_DC``, the optimal weights ``w = A t_D``,
the Schur complement ``M_CC - M_CD V`` with diagonal s, and the residual
``r = t_C - M_CD w``. So it contains all that the exact change by an exchange of q for j
needs,

.. math:: \frac{(w_j - V_{jq} r_q / s_q)^2}{A_{jj} + V_{jq}^2 / s_q} - \frac{r_q^2}{s_q}.

Adding an entry and removing one are the same pivot up to a sign.

References
----------
.. [1] M. Tsatsomeros, "Principal pivot transforms: properties and applications", Linear
   Algebra and its Applications 2000.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Exchange(NamedTuple):
    """Best exchange of every row: its change of the objective, and its slots; (rows,)."""

    change: Tensor  # infinite if there is none
    entering: Tensor
    leaving: Tensor


class Pivots:
    """Tableaus of many rows; the first half of the slots is kept at the start.

    Parameters
    ----------
    matrix, target
        M and t, float64, shapes (rows, slots, slots) and (rows, slots).
    kept
        Number of slots that are kept at the start: the first ones.
    possible
        Whether a slot contains an entry, shape (rows, slots).
    groups
        Only slots of equal groups are exchanged, shape (rows, slots); None for any.
    """

    def __init__(
        self,
        matrix: Tensor,
        target: Tensor,
        kept: int,
        possible: Tensor,
        groups: Tensor | None = None,
    ) -> None:
        slots = target.shape[1]
        self._groups = groups
        self.kept = possible & (torch.arange(slots, device=target.device) < kept)
        table = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
        table[:, :slots, slots] = table[:, slots, :slots] = target
        lower, info = torch.linalg.cholesky_ex(matrix[:, :kept, :kept])
        lower[info > 0] = torch.nan
        inverse = torch.cholesky_inverse(lower)
        across = table[:, :kept, kept:]
        effect = inverse @ across
        table[:, kept:, kept:] -= across.mT @ effect
        table[:, :kept, :kept], table[:, :kept, kept:] = -inverse, effect
        table[:, kept:, :kept] = effect.mT
        self.table = table

    def rows(self, selection: Tensor) -> None:
        """Continue with some of the rows."""
        self.table, self.kept = self.table[selection], self.kept[selection]
        if self._groups is not None:
            self._groups = self._groups[selection]

    @property
    def gained(self) -> Tensor:
        """``t_D M_DD^-1 t_D``, shape (rows,)."""
        return -self.table[:, -1, -1]

    def best(self, candidates: int) -> Exchange:
        """Best exchange of each row, among the entries that gain most alone."""
        slots = self.kept.shape[1]
        diagonal = self.table.diagonal(dim1=1, dim2=2)[:, :slots]
        column = self.table[:, :slots, slots]
        gains = (column.square() / diagonal).masked_fill(self.kept | (diagonal <= 0), 0)
        gain, entering = gains.topk(min(candidates, slots), dim=1)
        effect = self.table[:, :slots].gather(
            1, entering[:, :, None].expand(-1, -1, slots + 1)
        )[:, :, :slots]
        schur = diagonal.gather(1, entering)[:, :, None]
        weight = column[:, None, :] - effect * (
            column.gather(1, entering)[:, :, None] / schur
        )
        grown = effect.square_().div_(schur).sub_(diagonal[:, None, :])
        change = weight.square_().div_(grown).sub_(gain[:, :, None])
        possible = self.kept[:, None, :] & (gain > 0)[:, :, None]
        if self._groups is not None:
            own = self._groups.gather(1, entering)
            possible &= own[:, :, None] == self._groups[:, None, :]
        change.masked_fill_(~possible, torch.inf)
        best, flat = change.flatten(1).min(dim=1)
        chosen = entering.gather(1, (flat // slots)[:, None])[:, 0]
        return Exchange(best, chosen, flat % slots)

    def exchange(self, entering: Tensor, leaving: Tensor) -> None:
        """Add one slot and remove one in every row."""
        self._pivot(entering, 1)
        self._pivot(leaving, -1)
        at = torch.arange(len(entering), device=entering.device)
        self.kept[at, entering] = True
        self.kept[at, leaving] = False

    def _pivot(self, slot: Tensor, sign: int) -> None:
        at = torch.arange(len(slot), device=slot.device)
        line = self.table[at, slot]
        scaled = line / line[at, slot][:, None]
        self.table.baddbmm_(line[:, :, None], scaled[:, None, :], alpha=-1)
        border = sign * scaled
        border[at, slot] = -1 / line[at, slot]
        self.table[at, slot] = self.table[at, :, slot] = border

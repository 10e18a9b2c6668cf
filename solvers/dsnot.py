r"""DSnoT: edit a mask until the mean residual of every row is small, without training.

After pruning, row i has the mean residual ``eps_i = W_i mu - What_i muhat``, with mu and
muhat the input means of the dense and the pruned model. It is the mean change of the
output. A cycle restores one removed weight and removes one kept weight of the row, so
counts stay exact [1]_:

- grow the removed entry with the largest ``sign(eps_i) W_ij muhat_j / Var(xhat_j)^power``,
  which lowers ``|eps_i|`` most in relation to the variance that it adds;
- prune the kept entry with the smallest Wanda score among those whose removal does not
  raise ``|eps_i|``: ``sign(eps_i) W_ij muhat_j <= 0``.

With n:m, both are in the same group.

References
----------
.. [1] Y. Zhang, L. Zhao, M. Lin, Y. Sun, Y. Yao, X. Han, J. Tanner, S. Liu, R. Ji, "Dynamic
   Sparse No Training: Training-Free Fine-tuning for Sparse LLMs", ICLR 2024,
   arXiv:2310.08915, section 3.

Notes
-----
Deviations: (1) the threshold on ``|eps_i|`` is relative to the root mean square of the
dense outputs of the row; the published one is 0.1 in the units of the outputs, so that the
mask changes when the weights are scaled; (2) a cycle that would not lower ``|eps_i|``,
because the restored weight overshoots, is not made and ends the row, so the mean residual
never grows; (3) dense and pruned inputs may differ; (4) the variance of a channel is at
least 1e-6 of its second moment, because smaller values are rounding.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError
from layerwise.patterns import NM, Unstructured
from layerwise.problem import CenteredProblem, LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.options import check_at_least, check_finite
from layerwise.solvers.wanda import wanda_mask, wanda_scores


@dataclass(frozen=True)
class DSnoT:
    """Exchange weights one by one while that lowers the mean residual of their row.

    Kept weights have their dense values. Cost O(out in) a cycle, for all rows together.

    Parameters
    ----------
    max_cycles
        Largest number of exchanges per row.
    tolerance
        Mean residual below which a row is not changed, relative to the root mean square of
        its dense outputs.
    variance_power
        Exponent of the variance in the choice of the restored weight.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram", "mean"})
    guarantee: ClassVar[str] = "mean residual never above its start's"
    name: str = "dsnot"
    max_cycles: int = 50
    tolerance: float = 0.1
    variance_power: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(self, max_cycles=0, tolerance=0)
        check_finite(self, "variance_power")

    def can_solve(self, problem: LayerProblem) -> bool:
        """Unstructured and n:m; nothing can be exchanged in a fixed mask."""
        return isinstance(problem.pattern, Unstructured | NM)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Edit the mask of `initial`, by default Wanda's."""
        edit = _Edit(problem, wanda_mask(problem, initial), self.variance_power)
        limit = self.tolerance * problem.energy.sqrt()
        exchanges, cycles = 0, 0
        while cycles < self.max_cycles:
            moved = edit.exchange((edit.residual.abs() > limit).nonzero()[:, 0])
            if moved == 0:
                break
            exchanges, cycles = exchanges + moved, cycles + 1
        weight = torch.where(edit.mask, problem.weight.to(problem.dtype), 0)
        return Answer(
            weight,
            edit.mask,
            iterations=cycles,
            stats={"exchanges": float(exchanges)},
        )


class _Edit:
    """A mask and the mean residual of every row, as they change."""

    def __init__(self, problem: LayerProblem, mask: Tensor, variance_power: float) -> None:
        self.mask = mask.clone()
        self.residual = mean_residual(problem, mask)
        self._effects = mean_effects(problem)
        self._variance = _variance(problem) ** variance_power
        self._scores = wanda_scores(problem)
        width, pattern = problem.shape[1], problem.pattern
        size = pattern.m if isinstance(pattern, NM) else width
        self._group = torch.arange(width, device=mask.device) // size
        self._group_size = size

    def exchange(self, rows: Tensor) -> int:
        """Make one exchange in each of these rows where it helps; return their number."""
        if len(rows) == 0:
            return 0
        effects, kept = self._effects[rows], self.mask[rows]
        gain = self.residual[rows].sign()[:, None] * effects  # of restoring the weight
        removable = kept & (gain <= 0)
        restorable = ~kept & (gain > 0) & self._in_same_group(removable)
        grow = _first_largest(gain / self._variance, restorable)
        removable &= self._group == self._group[grow][:, None]
        prune = _first_largest(-self._scores[rows], removable)
        each = torch.arange(len(rows), device=rows.device)
        change = effects[each, prune] - effects[each, grow]
        helps = (self.residual[rows] + change).abs() < self.residual[rows].abs()
        helps &= restorable[each, grow] & removable[each, prune]
        rows = rows[helps]
        self.mask[rows, grow[helps]] = True
        self.mask[rows, prune[helps]] = False
        self.residual[rows] += change[helps]
        return len(rows)

    def _in_same_group(self, entries: Tensor) -> Tensor:
        """Entries whose group holds one of the given entries."""
        groups = entries.view(len(entries), -1, self._group_size).any(dim=2)
        return groups.repeat_interleave(self._group_size, dim=1)


def mean_effects(problem: LayerProblem) -> Tensor:
    """``W_ij muhat_j``, the share of a weight in the mean output, (out, in), float64."""
    return problem.weight.double() * _pruned_mean(problem)


def mean_residual(problem: LayerProblem, mask: Tensor) -> Tensor:
    """``W mu - (mask * W) muhat``, shape (out,), float64."""
    removed = torch.where(mask, 0, mean_effects(problem)).sum(dim=1)
    drift = problem.weight.double() @ (_mean(problem) - _pruned_mean(problem))
    return removed + drift


def _mean(problem: LayerProblem) -> Tensor:
    mean = problem.moments.input_mean
    if mean is None:
        message = (
            "dsnot needs the means of the inputs: build the problem from inputs, or give "
            "its Moments input_mean (and pruned_input_mean)"
        )
        raise InvalidProblemError(message)
    if isinstance(problem, CenteredProblem):  # its bias makes every mean residual zero
        return torch.zeros_like(mean)
    return mean


def _pruned_mean(problem: LayerProblem) -> Tensor:
    mean = _mean(problem)
    if isinstance(problem, CenteredProblem) or problem.moments.cross_gram is None:
        return mean
    pruned = problem.moments.pruned_input_mean
    if pruned is None:
        message = (
            "dsnot needs the means of the inputs of both models: give the Moments "
            "pruned_input_mean as well"
        )
        raise InvalidProblemError(message)
    return pruned


def _variance(problem: LayerProblem) -> Tensor:
    """``Var(xhat_j)``, shape (in,), float64; one for a dead channel."""
    second = problem.gram.diagonal()
    variance = second - _pruned_mean(problem).square()
    variance = variance.clamp(min=problem.moments.rounding * second)
    return torch.where(second > 0, variance, 1)


def _first_largest(values: Tensor, allowed: Tensor) -> Tensor:
    """Index of the largest allowed value of every row; any index if none is allowed."""
    best = values.masked_fill(~allowed, -torch.inf)
    # argmax promises no order among ties
    return (best == best.amax(dim=1, keepdim=True)).int().argmax(dim=1)

r"""Multi-weight removal: masks and weights that account for interacting removals.

Mask and update each have two versions: for single weights, or for many at once.

Mask. ``single`` scores every weight alone, by ``w^2 / [G^-1]_jj``, once for the whole
layer. ``multi`` goes from left to right in parts: groups of an n:m pattern or blocks of
columns. The columns to the left of a part B are fixed and those to the right are free, so
the losses follow from the inverse of the trailing gram. With ``G^-1 = U^T U``, U upper
triangular, it is ``U_BB^T U_BB`` on the part, the same for all rows. So

- an n:m group takes the pattern with the least joint loss of all patterns;
- a block of columns removes its share of the smallest scores of all remaining columns.

The weights of the part are removed jointly and the columns to the right compensate,

.. math:: W_R \leftarrow W_R - w_P \big[(U_{BB}^\top U_{BB})_{PP}\big]^{-1}
          (U_{BB}^\top)_{P,:} \, U_{BR} .

Update. On the final mask, ``single`` sweeps the columns as SparseGPT does. ``joint`` takes
the best weights: by the closed form of :mod:`~layerwise.solvers.refit.joint_removal` if few
weights are removed, else by the least squares problem of the kept ones.

References
----------
.. [1] P. Zhao et al., "Pruning Foundation Models for High Accuracy without Retraining",
   Findings of EMNLP 2024, arXiv:2410.15567, section 3.
.. [2] I. Ilin, P. Richtarik, "Thanos: A Block-wise Pruning Algorithm for Efficient Large
   Language Model Compression", 2025, arXiv:2504.05346 (blocks of unstructured masks).

Notes
-----
Deviations: (1) an unstructured ``multi`` mask is chosen by blocks, as in [2]_, because the
paper's exact choice is over all subsets of a row; it scores removals by their cost, where
[2]_ takes the weight times the input norm; (2) mask and update are separate steps, so
``single`` scores are computed before any update; (3) any gram and cross-gram, by starting
from W_ls.
"""

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.least_squares import LeastSquares, direct_pays
from layerwise.solvers.options import check_at_least, check_one_of
from layerwise.solvers.refit.joint_removal import multipliers, remove_jointly
from layerwise.solvers.sparsegpt import SparseGPT, least_squares_weight

MOST_PATTERNS = 70  # of a group: 4:8 has 70, 8:16 has 12870
PANEL = 128  # columns of n:m groups that update the rest by one product
BLOCKS, LARGEST_BLOCK = 16, 32  # more or smaller blocks gain next to nothing


@dataclass(frozen=True)
class MultiWeight:
    """Mask by single or joint losses, weights by a sweep or in closed form.

    Cost O(in^3 + out in^2), plus the refit of ``update="joint"``.

    Parameters
    ----------
    mask
        ``"single"`` or ``"multi"``: the losses that choose the mask.
    update
        ``"single"``, one sweep over the columns, or ``"joint"``, optimal on the mask.
    block_size
        Columns that an unstructured ``"multi"`` mask removes jointly; None for a
        sixteenth of the width, at most 32.
    memory_budget
        Bytes for the systems of joint removals and of the refit.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    name: str = "multi-weight"
    mask: Literal["single", "multi"] = "multi"
    update: Literal["single", "joint"] = "joint"
    block_size: int | None = None
    memory_budget: int = LeastSquares.memory_budget

    def __post_init__(self) -> None:
        check_one_of(self, "mask", "single", "multi")
        check_one_of(self, "update", "single", "joint")
        if self.block_size is not None:
            check_at_least(self, block_size=1)

    @property
    def guarantee(self) -> str:
        """Guarantee of the answer, in words."""
        return "certified refit" if self.update == "joint" else "none"

    def can_solve(self, problem: LayerProblem) -> bool:
        """Unstructured, fixed, and n:m; with ``"multi"`` up to 70 patterns per group."""
        pattern = problem.pattern
        if isinstance(pattern, NM) and self.mask == "multi":
            return comb(pattern.m, pattern.n) <= MOST_PATTERNS
        return isinstance(pattern, Unstructured | NM | FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Choose the mask, then find its weights."""
        if isinstance(problem.pattern, FixedMask):
            kept = problem.pattern.mask(problem.weight)
        else:
            factor = problem.moments.factor(problem.damping, problem.dtype, reverse=True)
            if factor.raised:
                problem = problem.with_damping(factor.damping)
            start = least_squares_weight(problem, factor).to(factor.lower.dtype)
            upper = factor.lower.flip(0, 1)
            eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
            root = torch.linalg.solve_triangular(upper, eye, upper=True)
            kept = self._choose(problem, root, start)
        if self.update == "single":
            return SparseGPT().solve(problem.with_pattern(FixedMask(kept)))
        return self._refit(problem, kept)

    def _choose(self, problem: LayerProblem, root: Tensor, start: Tensor) -> Tensor:
        if self.mask == "single":
            return problem.pattern.mask(start.abs() / root.norm(dim=0))
        if isinstance(problem.pattern, NM):
            return _choose_groups(problem.pattern, root, start)
        assert isinstance(problem.pattern, Unstructured)
        size = self.block_size or min(-(-len(root) // BLOCKS), LARGEST_BLOCK)
        return _choose_blocks(problem.pattern, root, start, size, self.memory_budget)

    def _refit(self, problem: LayerProblem, kept: Tensor) -> Answer:
        """Optimal weights on a mask; the refit corrects the error of the closed form."""
        most_kept, most_removed = (int(m.sum(dim=1).amax()) for m in (kept, ~kept))
        weight = problem.weight
        if most_removed < most_kept and direct_pays(problem, kept):
            factor = problem.factor(torch.float64)
            start = problem.weight.double()
            if problem.shift is not None:
                start = start + factor.solve_rows(problem.shift)
            inverse = torch.cholesky_inverse(factor.lower)
            weight, _ = remove_jointly(start, inverse, kept, self.memory_budget)
        refit = LeastSquares(memory_budget=self.memory_budget)
        return refit.refit(problem, weight, kept)


def multi_weight_ss() -> MultiWeight:
    """Mask from the losses of single weights; a sweep removes them one by one."""
    return MultiWeight(name="multi-weight-ss", mask="single", update="single")


def multi_weight_sm() -> MultiWeight:
    """Mask from the losses of single weights; all are removed at once."""
    return MultiWeight(name="multi-weight-sm", mask="single", update="joint")


def multi_weight_ms() -> MultiWeight:
    """Mask from exact losses of joint removals; a sweep removes them one by one."""
    return MultiWeight(name="multi-weight-ms", mask="multi", update="single")


def multi_weight_mm() -> MultiWeight:
    """Mask from exact losses of joint removals; all are removed at once."""
    return MultiWeight(name="multi-weight-mm", mask="multi", update="joint")


def _choose_groups(
    pattern: NM,
    root: Tensor,  # U (in, in)
    start: Tensor,  # W_ls (out, in)
) -> Tensor:  # (out, in) bool
    """Pattern of least joint loss for every group, from left to right."""
    subsets = list(combinations(range(pattern.m), pattern.m - pattern.n))
    removals = torch.tensor(subsets, dtype=torch.long, device=root.device)
    current, width = start.clone(), len(root)
    mask = torch.ones_like(start, dtype=torch.bool)
    panel_size = max(PANEL // pattern.m, 1) * pattern.m
    for begin in range(0, width, panel_size):
        end = min(begin + panel_size, width)
        push = torch.zeros_like(current[:, begin:end])
        for left in range(begin, end, pattern.m):
            group = slice(left, left + pattern.m)
            local = root[group, group].double()
            choice, pull = _cheapest_removal(current[:, group], local.T @ local, removals)
            mask[:, group] = mask[:, group].scatter(1, removals[choice], False)
            step = (pull @ local.T).to(root.dtype)
            current[:, group.stop : end] -= step @ root[group, group.stop : end]
            push[:, left - begin : group.stop - begin] = step
        current[:, end:] -= push @ root[begin:end, end:]
    return mask


def _cheapest_removal(
    current: Tensor,  # (rows, m)
    inverse: Tensor,  # (m, m) float64, of the trailing gram on the group
    removals: Tensor,  # (patterns, removed), the members P of each pattern
) -> tuple[Tensor, Tensor]:  # (rows,) index of the pattern, (rows, m) multipliers
    """Pattern with the smallest ``w_P [(G^-1)_PP]^-1 w_P``, row by row.

    With ``(G^-1)_PP = L L^T`` the loss is ``||L^-1 w_P||^2``: the matrices ``L^-1`` of all
    patterns are stacked, and one product gives the losses of all patterns and rows.
    """
    rows, m = current.shape
    lower = torch.linalg.cholesky(inverse[removals[:, :, None], removals[:, None, :]])
    members = torch.eye(m, dtype=inverse.dtype, device=inverse.device)[removals]
    half = torch.linalg.solve_triangular(lower, members, upper=False)
    images = current.double() @ half.reshape(-1, m).T
    images = images.view(rows, *half.shape[:2])  # (rows, patterns, removed)
    choice = images.square().sum(dim=2).argmin(dim=1)
    chosen = images[torch.arange(rows, device=choice.device), choice]
    return choice, (chosen[:, None, :] @ half[choice])[:, 0, :]


def _choose_blocks(
    pattern: Unstructured,
    root: Tensor,  # U (in, in)
    start: Tensor,  # W_ls (out, in)
    block_size: int,
    memory_budget: int,
) -> Tensor:  # (out, in) bool
    """Mask chosen block by block, with one budget for all columns.

    Before every block, the remaining columns are scored anew. The block removes those of
    its weights that the pattern removes by the current scores. Finished columns keep their
    decision by a score below or above all others, which makes the counts exact.
    """
    current, width = start.clone(), len(root)
    scores = torch.empty_like(start)
    for begin in range(0, width, block_size):
        end = min(begin + block_size, width)
        block = slice(begin, end)
        cost = root[begin:, begin:].norm(dim=0)  # root of diag of the trailing inverse
        scores[:, begin:] = current[:, begin:].abs() / cost
        kept = pattern.mask(scores)[:, block]
        scores[:, block] = torch.where(kept, torch.inf, -1.0)
        if end == width:
            break
        local = root[block, block].double()
        pull = multipliers(current[:, block].double(), local.T @ local, kept, memory_budget)
        step = (pull @ local.T).to(root.dtype)
        current[:, end:] -= step @ root[block, end:]
    return scores > 0

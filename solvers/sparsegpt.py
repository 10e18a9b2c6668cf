r"""SparseGPT: one sweep over the columns, each removal compensated by those to its right.

Let ``gram = V V^T`` with V upper triangular and ``E = W_ls - What``, W_ls the least
squares weight (the dense weight if Xhat = X). The objective above its minimum is
``||E V||_F^2``. Going from left to right, column j of ``E V`` is
``E_j V_jj + A_j`` with ``A_j = sum_{i<j} E_i V_ij``, so a kept weight takes the value

.. math:: \hat W_j = W_j + A_j / V_{jj}

that makes this column zero, and a removed weight costs ``(W_j + A_j / V_jj)^2 V_jj^2``.
These are the weights of the published sweep, computed without the inverse Hessian: ``V_jj``
is the reciprocal of the diagonal of its factor, and the published "current weight" of a
block B is ``W_B + A_B V_BB^-1``.

References
----------
.. [1] E. Frantar, D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately
   Pruned in One-Shot", ICML 2023, arXiv:2301.00774, algorithm 1.

Notes
-----
Deviations: (1) counts are exact by a running floor, where the published rule
``score <= threshold`` removes one weight too many per block and all ties
(``test_sparsegpt.py::test_counts_are_exact``); (2) ``group="row"`` compares within rows;
(3) any gram and cross-gram, by starting from W_ls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError
from layerwise.linalg import Factor
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured, keep_largest
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration

WIDEST_FUSED = 128  # columns of a block whose errors fit in the registers of a GPU
PANEL = 16  # columns swept one by one before their effect is applied as a product


@dataclass(frozen=True)
class SparseGPT:
    """Column sweep with blocked updates. Cost O(in^3 / 3 + out in^2).

    Parameters
    ----------
    block_size
        Columns whose mask is chosen together (unstructured patterns), from the current
        weights at the beginning of the block. It has no effect on the weights of a fixed
        mask, and n:m groups are chosen one by one.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "none"
    name: str = "sparsegpt"
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.block_size < 1:
            message = f"block_size must be at least 1, got {self.block_size}"
            raise InvalidProblemError(message)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Unstructured, n:m and fixed masks."""
        return isinstance(problem.pattern, Unstructured | NM | FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Sweep once from left to right."""
        factor = problem.moments.factor(problem.damping, problem.dtype, reverse=True)
        upper = factor.lower.flip(0, 1).to(problem.dtype)
        start = least_squares_weight(problem, factor)
        weight, mask = self._sweep(problem, upper, start.T.contiguous())
        return Answer(weight, mask, stats={"damping": factor.damping})

    def _sweep(
        self,
        problem: LayerProblem,
        upper: Tensor,  # V (in, in)
        start: Tensor,  # W_ls^T (in, out): a column of the layer is contiguous
    ) -> tuple[Tensor, Tensor]:  # (out, in), (out, in)
        width, block_size = len(start), self.block_size
        panel_size = PANEL
        if isinstance(problem.pattern, NM):
            m = problem.pattern.m
            panel_size = max(PANEL // m, 1) * m
            block_size = max(block_size // panel_size, 1) * panel_size
        result, error = torch.empty_like(start), torch.empty_like(start)
        carry = torch.zeros_like(start)  # A^T
        mask = torch.ones_like(start, dtype=torch.bool)
        pivots = upper.diagonal().tolist()  # once, because it synchronises with a GPU
        fused = _fused_sweep(start, problem.pattern, block_size)
        for begin in range(0, width, block_size):
            end = min(begin + block_size, width)
            if not isinstance(problem.pattern, NM):
                block = slice(begin, end)
                mask[block] = _block_mask(problem, upper, start, carry, block)
            if fused is not None:
                fused(upper, start, carry, result, error, mask, slice(begin, end))
                panels = range(0)
            else:
                panels = range(begin, end, panel_size)
            for left in panels:
                right = min(left + panel_size, end)
                panel = slice(left, right)
                if isinstance(problem.pattern, NM):
                    _sweep_groups(
                        problem.pattern,
                        pivots,
                        upper,
                        start,
                        carry,
                        result,
                        error,
                        mask,
                        panel,
                    )
                else:
                    _sweep_columns(pivots, upper, start, carry, result, error, mask, panel)
                # effect of the panel on the rest of its block, of the block on the rest
                carry[right:end].addmm_(upper[panel, right:end].T, error[panel])
            carry[end:].addmm_(upper[begin:end, end:].T, error[begin:end])
        return result.T.contiguous(), mask.T.contiguous()


def least_squares_weight(problem: LayerProblem, factor: Factor) -> Tensor:  # (out, in)
    """W_ls, the damped unconstrained minimiser, from a reversed factor."""
    start = problem.weight.to(problem.dtype)
    if problem.shift is None:
        return start
    step = factor.solve_rows(problem.shift.flip(1)).flip(1)
    return start + step.to(problem.dtype)


def _fused_sweep(
    like: Tensor, pattern: Pattern, block_size: int
) -> Callable[..., None] | None:
    """One kernel for a block, on GPUs with Triton; None to loop over its columns.

    The kernel cannot choose the masks of n:m groups during the sweep.
    """
    if not like.is_cuda or block_size > WIDEST_FUSED or isinstance(pattern, NM):
        return None
    try:
        from layerwise.solvers.sweep_kernel import sweep_block
    except ImportError:
        return None
    return sweep_block


def _sweep_columns(
    pivots: list[float],  # diagonal of V
    upper: Tensor,
    start: Tensor,
    carry: Tensor,
    result: Tensor,
    error: Tensor,
    mask: Tensor,
    columns: slice,
) -> None:
    """Compute the final weights of a few neighbouring columns, one after the other."""
    stop = columns.stop
    for index in range(columns.start, stop):
        torch.add(start[index], carry[index], alpha=1 / pivots[index], out=result[index])
        result[index].masked_fill_(~mask[index], 0)
        torch.sub(start[index], result[index], out=error[index])
        carry[index + 1 : stop].addr_(upper[index, index + 1 : stop], error[index])


def _sweep_groups(
    pattern: NM,
    pivots: list[float],
    upper: Tensor,
    start: Tensor,
    carry: Tensor,
    result: Tensor,
    error: Tensor,
    mask: Tensor,
    panel: slice,
) -> None:
    """Choose the mask of every n:m group from current weights, then sweep its columns."""
    for begin in range(panel.start, panel.stop, pattern.m):
        group = slice(begin, begin + pattern.m)
        scores = _removal_scores(upper, start, carry, group)
        mask[group] = keep_largest(scores.T, pattern.m - pattern.n).T
        _sweep_columns(pivots, upper, start, carry, result, error, mask, group)
        rest = slice(group.stop, panel.stop)
        carry[rest].addmm_(upper[group, rest].T, error[group])


def _removal_scores(
    upper: Tensor, start: Tensor, carry: Tensor, columns: slice
) -> Tensor:  # (columns, out)
    """Square root of the cost of removing each current weight, ``|W + A V^-1| V_jj``.

    The order is the same, and the cost itself could exceed the range of float32.
    """
    local = upper[columns, columns]
    current: Tensor = torch.linalg.solve_triangular(local.T, carry[columns], upper=False)
    current += start[columns]
    return (current * local.diagonal()[:, None]).abs_()


def _block_mask(
    problem: LayerProblem, upper: Tensor, start: Tensor, carry: Tensor, block: slice
) -> Tensor:  # (columns, out)
    """Mask of a block; a running floor makes the count of the whole layer exact."""
    pattern = problem.pattern
    if isinstance(pattern, FixedMask):
        return pattern.kept[:, block].T
    assert isinstance(pattern, Unstructured)
    scores = _removal_scores(upper, start, carry, block)
    rows = scores.shape[1] if pattern.group == "layer" else 1
    removed = pattern.removed(rows * block.stop) - pattern.removed(rows * block.start)
    if pattern.group == "layer":
        return keep_largest(scores.reshape(1, -1), removed).view_as(scores)
    return keep_largest(scores.T, removed).T

r"""Lower bounds of the sparse problem: no mask and no weights can do better.

Let w be the unconstrained minimiser and ``H = D + R`` the damped gram, with D block
diagonal and R positive semi-definite. Then for any y and v

.. math:: (v - w) R (v - w)^\top \ge 2\, y R (v - w)^\top - y R y^\top ,

so that the objective is at least a sum over blocks. The minimum of this sum over all masks
of the pattern has a closed form. Every y gives a valid bound. A good y
(:mod:`layerwise.perspective`) and a good D (:mod:`layerwise.splits`) cost some products
that all rows share.

Notes
-----
The bound is valid however well y and D were optimised. The last evaluation is in float64;
its rounding is bounded term by term, with ``(in + 8) eps`` for a sum, and subtracted. A
factorization with a margin proves that R is positive semi-definite. The moments count as
exact. Where they allow an objective below zero, so do the bounds, until the very end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError
from layerwise.evaluate import unclamped_rows
from layerwise.gram import exact_bfloat16
from layerwise.linalg import ieee_products
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.perspective import has_one_budget, relax, shared_inverse
from layerwise.problem import LayerProblem, check_problem
from layerwise.rounding import EPSILON, objective_bounds, terms_of_shift
from layerwise.solution import Certificate, Solution
from layerwise.splits import (
    proven_split,
    remainder,
    smallest_share,
    weighted_split,
)

TINY = 1e-30  # floor of the importance, for problems that lose nothing in any row
ROUNDS = 5  # splits, each improved with the relaxed answer to the one before
INSIDE = 0.98  # first split, in units of the largest multiple of the diagonal
LARGEST_COUNT = 70  # most masks of a block that are enumerated: 4:8
MEMORY_BUDGET = 1 << 30
TEMPORARIES = 16  # float64 matrices of the size of a chunk


@ieee_products()
def lower_bounds(
    problem: LayerProblem,
    weight: Tensor | None = None,
    *,
    memory_budget: int = MEMORY_BUDGET,
) -> Tensor:
    """Lower bounds of the damped objective over all masks of the pattern and all weights.

    Parameters
    ----------
    problem
        A problem with a pattern per row, with one budget for the layer, or a fixed mask.
    weight
        Feasible weights (out, in) to start from. They improve the bounds; the guarantee is
        the same without them.
    memory_budget
        Bytes for the rows that are worked on together, in addition to some copies of weight
        and gram. One budget for the layer needs all its rows at once.

    Returns
    -------
    Tensor
        Float64, shape (out,): no feasible row has a smaller damped objective. With one
        budget for the layer, shape (1,): a bound of the sum over the rows. Never negative,
        because an objective is a norm; zero if the damped gram is numerically singular.

    Raises
    ------
    InvalidProblemError
        For patterns of whole columns, whose rows are not independent, and indefinite grams.
    """
    check_problem(problem)
    if not isinstance(problem.pattern, Unstructured | NM | FixedMask):
        message = (
            f"lower bounds need unstructured, n:m or fixed masks, not {problem.pattern}: "
            "with whole columns the rows are not independent"
        )
        raise InvalidProblemError(message)
    return _unclamped(problem, weight, memory_budget).clamp(min=0)


def _unclamped(problem: LayerProblem, weight: Tensor | None, memory_budget: int) -> Tensor:
    """Bounds of the objective as the moments give it, also below zero; -inf if unknown."""
    problem.moments.check_definite()
    least = 0.0 if problem.shift is None else -torch.inf  # 0: it is a quadratic form
    size = 1 if has_one_budget(problem.pattern) else len(problem.energy)
    none = torch.full_like(problem.energy[:size], least)
    if problem.factor(torch.float64).raised:
        return none
    scaled = _ScaledProblem(problem, memory_budget)
    if scaled.largest is None:
        return none
    if isinstance(problem.pattern, FixedMask):
        bound = scaled.bound_on_mask(problem.pattern.kept.to(problem.weight.device))
        return torch.where(torch.isfinite(bound), bound, none)
    best = none
    for bound in scaled.bounds(scaled.largest, weight):
        best = torch.maximum(best, torch.where(torch.isfinite(bound), bound, none))
    return best


def proven_gap(
    problem: LayerProblem, solution: Solution, *, memory_budget: int = MEMORY_BUDGET
) -> Certificate:
    """Share of a solution's damped objective that any other answer could save at most.

    Parameters
    ----------
    problem
        The problem at the damping that was used.
    solution
        Its weights are graded, and the search for the bound starts from them.
    memory_budget
        See :func:`lower_bounds`.

    Returns
    -------
    Certificate
        Of kind ``"support"``: ``(objective - lower bound) / objective``, summed over rows;
        1 if nothing is proven and 0 if the answer is the best one.
    """
    check_problem(problem)
    gap = proven_gap_of(problem, solution.weight, memory_budget=memory_budget)
    return Certificate("support", gap, "damped objective of the answer")


def proven_gap_of(
    problem: LayerProblem, weight: Tensor, *, memory_budget: int = MEMORY_BUDGET
) -> float:
    """Gap of :func:`proven_gap` for weights (out, in) from any source."""
    return gap_above(problem, weight, least_objective(problem, weight, memory_budget))


def least_objective(
    problem: LayerProblem, weight: Tensor | None, memory_budget: int = MEMORY_BUDGET
) -> float:
    """Lower bound of the damped objective of the layer, from the bounds of its rows.

    Negative where rounded moments allow an objective below zero; -inf if nothing is proven.
    """
    bounds = _unclamped(problem, weight, memory_budget)
    return float(bounds.sum() - len(bounds) * EPSILON * bounds.abs().sum())


def gap_above(problem: LayerProblem, weight: Tensor, bound: float) -> float:
    """Share of the damped objective of weights that is above a lower bound, rounded up.

    1 if nothing is proven: the objective is below its rounding, or below the bound.
    """
    rows, rounding = objective_bounds(problem, weight)
    value = float(rows.sum())
    if value == 0 and problem.shift is None:
        return 0.0
    most = value + float(rounding.sum()) + len(rows) * EPSILON * float(rows.abs().sum())
    if not (most > 0 and bound <= most):
        return 1.0
    return min(1.0, 1 - bound / most + 2 * EPSILON)


@dataclass(frozen=True, eq=False)
class _Split:
    """A split ``H = D + R`` with the matrices of its evaluation, shared by all rows."""

    blocks: Tensor  # D, (blocks, size, size)
    inverse: Tensor  # of the blocks
    rest: Tensor  # R, (in, in)
    condition: Tensor  # largest condition number of a block, ()

    @classmethod
    def of(cls, gram: Tensor, blocks: Tensor) -> "_Split":
        values = torch.linalg.eigvalsh(blocks)
        condition = (values[:, -1] / values[:, 0]).max()
        return cls(blocks, torch.linalg.inv(blocks), remainder(gram, blocks), condition)

    @cached_property
    def absolute_rest(self) -> Tensor:
        """Absolute values of R."""
        return self.rest.abs()


class _ScaledProblem:
    """The problem around its unconstrained minimiser, columns scaled by powers of two.

    The scaling is exact and brings the diagonal of the gram near one, so that a margin on
    the diagonal is a margin in norm.
    """

    def __init__(self, problem: LayerProblem, memory_budget: int) -> None:
        self.pattern = problem.pattern
        dense, shift = problem.weight.double(), problem.shift
        free = dense
        if shift is not None:
            free = dense + problem.factor(torch.float64).solve_rows(shift)
        gram = problem.damped_gram(torch.float64)
        scale = torch.exp2(-(gram.diagonal().log2() / 2).round())
        self.gram = gram * scale * scale[:, None]
        self.scale, self.dense, self.free = scale, dense / scale, free / scale
        self.shift = None if shift is None else shift * scale
        self.drift = problem.drift
        self.base = unclamped_rows(problem, free, damped=True)
        self.unit = (len(gram) + 8) * EPSILON
        self.of_shift = None if shift is None else scale * terms_of_shift(problem)
        self.slope, self.terms, self.rounding = self._slope(slice(None), self.free)
        rows = len(dense)
        if not has_one_budget(problem.pattern):
            rows = max(1, memory_budget // (8 * TEMPORARIES * len(gram)))
        self.chunks = [slice(at, at + rows) for at in range(0, len(dense), rows)]
        self.budget = memory_budget

    @cached_property
    def largest(self) -> Tensor | None:
        """Largest multiple of the diagonal whose remainder is proven, or None."""
        return proven_split(self.gram, smallest_share(self.gram, 1))

    def _slope(self, rows: slice, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Minus half the gradient, the size of its terms, and rounding of the objective."""
        change = self.dense[rows] - weight
        slope = change @ self.gram
        terms = change.abs() @ self.gram.abs()
        if self.shift is not None and self.of_shift is not None:
            slope, terms = slope + self.shift[rows], terms + self.of_shift[rows]
        rounding = 2 * (change.abs() * terms).sum(dim=1) + self.drift[rows].abs()
        return slope, terms, self.unit * rounding

    def bounds(self, largest: Tensor, weight: Tensor | None) -> Iterator[Tensor]:
        """Bounds from several splits and directions, each of them valid."""
        if weight is None:
            start = torch.where(self.pattern.mask(self.free.abs()), self.free, 0)
        else:
            start = weight.detach().double() / self.scale
        of_largest = _Split.of(self.gram, largest)
        yield self.evaluate(of_largest, torch.zeros_like(self.free))  # the free minimum
        split: Tensor | None = INSIDE * largest
        directions = []
        for index in range(ROUNDS):
            if split is None:
                return
            prepared = _Split.of(self.gram, split)
            direction, importance = self._relaxed(prepared, start)
            directions.append(direction)
            yield self.evaluate(prepared, direction)
            if index + 1 == ROUNDS:
                break
            # the best bound is concave in D, with `importance` as its slope: Frank-Wolfe
            better = weighted_split(self.gram, split[:, 0, 0], importance)[:, None, None]
            split = proven_split(self.gram, torch.lerp(split, better, 1 / (index + 2)))
        yield self.evaluate(of_largest, directions[0])
        pattern = self.pattern
        if isinstance(pattern, NM) and comb(pattern.m, pattern.n) <= LARGEST_COUNT:
            blocks = proven_split(self.gram, smallest_share(self.gram, pattern.m))
            if blocks is not None:
                prepared = _Split.of(self.gram, blocks)
                for direction in directions:
                    yield self.evaluate(prepared, direction)

    def _relaxed(self, split: _Split, start: Tensor) -> tuple[Tensor, Tensor]:
        """Direction y of the relaxation, and the slope of the bound in each entry of D."""
        diagonal = split.blocks[:, 0, 0]
        root = diagonal.sqrt()
        inverse = shared_inverse(split.rest / root / root[:, None])
        rounded = exact_bfloat16(inverse.device)  # any direction gives a bound
        inverse = inverse.to(torch.bfloat16 if rounded else torch.float32)
        size = max((part * root).abs().max() for part in (self.free, start))
        size = size.clamp(min=torch.finfo(torch.float64).tiny)
        root = root / size
        directions, importance = [], torch.zeros_like(diagonal)
        for rows in self.chunks:
            weight, begin = self.free[rows] * root, start[rows] * root
            relaxed = relax(inverse, weight.float(), begin.float(), self.pattern)
            directions.append(relaxed.direction.double() / root)
            importance += relaxed.importance
        importance = importance / diagonal
        floor = 1e-3 * importance.mean() + TINY
        return torch.cat(directions), importance + floor

    def evaluate(self, split: _Split, direction: Tensor) -> Tensor:
        """Bound for one split and one y per row, minus its rounding."""
        values = [self._evaluate(split, direction[rows], rows) for rows in self.chunks]
        return _total(torch.cat(values), self.pattern)

    def _evaluate(self, split: _Split, direction: Tensor, rows: slice) -> Tensor:
        """Bound of some rows.

        ``reach`` times `unit` bounds the error of every entry of the linear term. This
        error times the distance of the minimiser from w bounds the error of the minimum.
        The distance itself is bounded because zero is feasible: in the norm of D, the
        minimiser of a block is at least as near to the centre as zero is.
        """
        free = self.free[rows]
        image = direction @ split.rest
        pull = image - self.slope[rows]
        reach = direction.abs() @ split.absolute_rest
        reach += self.slope[rows].abs() + self.terms[rows]
        step = _times_blocks(pull, split.inverse)
        centre = free - step
        separable, magnitude = _smallest(centre, split, self.pattern)
        taken = (pull * step).sum(dim=1)
        value = self.base[rows] - (direction * image).sum(dim=1) - taken + separable
        slack = self.unit * _times_blocks(reach, split.inverse.abs())
        far = _over_blocks(centre.abs() + free.abs() + step.abs() + slack, split)
        rounding = (reach * (direction.abs() + 2 * far)).sum(dim=1)
        terms = taken.abs() + magnitude + _quadratic(free, split)
        rounding += split.condition.square() * terms + self.base[rows].abs()
        return value - 4 * self.unit * rounding - self.rounding[rows]

    def bound_on_mask(self, kept: Tensor) -> Tensor:
        """Objective of the best weights on the mask, minus their possible gain; (out,).

        Weights with the gradient ``-2 s`` gain at most ``s D^-1 s``, because ``H >= D``.
        Cost: one factorization per row, O(out in^3), in float64.
        """
        assert self.largest is not None
        diagonal = self.largest[:, 0, 0]
        eye = torch.eye(len(diagonal), dtype=torch.float64, device=diagonal.device)
        count = max(1, self.budget // (24 * len(diagonal) ** 2))
        values = []
        for at in range(0, len(kept), count):
            rows, on = slice(at, at + count), kept[at : at + count]
            both = on[:, :, None] & on[:, None, :]
            lower = torch.linalg.cholesky(torch.where(both, self.gram, eye))
            weight = torch.where(on, self.dense[rows], 0)
            for _ in range(2):  # the second step corrects the rounding of the first
                slope = torch.where(on, self._slope(rows, weight)[0], 0)
                step = torch.cholesky_solve(slope[:, :, None], lower)[:, :, 0]
                weight = weight + torch.where(on, step, 0)
            slope, terms, rounding = self._slope(rows, weight)
            change = self.dense[rows] - weight
            shift = 0 if self.shift is None else self.shift[rows]
            value = (change * (slope + shift)).sum(dim=1) + self.drift[rows]
            missed = torch.where(on, slope.abs() + self.unit * terms, 0)
            gain = (missed.square() / diagonal).sum(dim=1)
            values.append(value - (1 + self.unit) * gain - 4 * rounding)
        return torch.cat(values)


def _smallest(centre: Tensor, split: _Split, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Minimum over masks of ``(v - t) D (v - t)^T``, and the size of its terms; (out,)."""
    if split.blocks.shape[1] == 1:
        gains = centre.square() * split.blocks[:, 0, 0]
        lost = torch.where(pattern.mask(gains), 0, gains)
        return lost.sum(dim=1), gains.sum(dim=1)
    assert isinstance(pattern, NM)
    blocks = centre.reshape(len(centre), -1, pattern.m)
    best = torch.full_like(blocks[:, :, 0], torch.inf)
    for removed in combinations(range(pattern.m), pattern.m - pattern.n):
        # minimised over the kept entries, D becomes the inverse of a block of its inverse
        chosen = torch.tensor(removed, dtype=torch.long, device=centre.device)
        schur = torch.linalg.inv(split.inverse[:, chosen[:, None], chosen])
        part = blocks[:, :, chosen]
        lost = torch.einsum("rbp,bpq,rbq->rb", part, schur, part)
        best = torch.minimum(best, lost)
    return best.sum(dim=1), _quadratic(centre, split)


def _total(rows: Tensor, pattern: Pattern) -> Tensor:
    """Bounds as returned: for one budget their sum, minus its rounding."""
    if not has_one_budget(pattern):
        return rows
    rounding = len(rows) * EPSILON * rows.abs().sum(0, keepdim=True)
    return rows.sum(0, keepdim=True) - rounding


def _times_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """``rows @ B`` for a block diagonal B."""
    size = blocks.shape[1]
    if size == 1:
        return rows * blocks[:, 0, 0]
    parts = rows.reshape(len(rows), -1, size)
    return torch.einsum("rbp,bpq->rbq", parts, blocks).reshape(rows.shape)


def _over_blocks(sizes: Tensor, split: _Split) -> Tensor:
    """Bound on every entry of a block: the sum of the block, in the norm of D."""
    width = split.blocks.shape[1]
    if width == 1:
        return sizes
    sums = sizes.reshape(len(sizes), -1, width).sum(dim=2, keepdim=True)
    return (split.condition.sqrt() * sums).expand(-1, -1, width).reshape(sizes.shape)


def _quadratic(rows: Tensor, split: _Split) -> Tensor:
    return (rows * _times_blocks(rows, split.blocks)).sum(dim=1)

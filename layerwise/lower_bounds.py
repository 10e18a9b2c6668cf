r"""Lower bounds of the sparse problem: no mask and no weights can do better.

With w the unconstrained minimiser, ``H = D + R`` the damped gram, D block diagonal and R
positive semi-definite, any y gives for any v

.. math:: (v - w) R (v - w)^\top \ge 2\, y R (v - w)^\top - y R y^\top ,

so that the objective is at least a sum over blocks, whose minimum over all masks of the
pattern is a closed form. Every y is valid; a good one costs some products that all rows
share (:mod:`layerwise.perspective`), and so does D (:mod:`layerwise.splits`).

Notes
-----
Validity does not rest on how well anything was optimised. The last evaluation is in
float64; its rounding is bounded term by term, with ``(in + 8) eps`` for a sum, and taken
off. That R is semi-definite is proven by a factorization with a margin.
"""

from collections.abc import Iterator
from itertools import combinations
from math import comb

import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError
from layerwise.evaluate import objective_rows, residual
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.perspective import has_one_budget, relax
from layerwise.problem import LayerProblem
from layerwise.solution import Certificate, Solution
from layerwise.splits import (
    proven_split,
    remainder,
    smallest_share,
    weighted_split,
)

EPSILON = torch.finfo(torch.float64).eps
ROUNDS = 3  # of splits, each better for the relaxed answer to the one before
INSIDE = 0.98  # of the largest multiple of the diagonal: a split with room to move
LARGEST_COUNT = 70  # masks of a block that are tried: 4:8
CHUNK_NUMBERS = 2**24  # in a batch of matrices


def lower_bounds(problem: LayerProblem, weight: Tensor | None = None) -> Tensor:
    """Lower bounds of the damped objective over all masks of the pattern and all weights.

    Parameters
    ----------
    problem
        Rows that each have their pattern, one budget for the layer, or a fixed mask.
    weight
        Feasible weights (out, in) to start from; better bounds, never other guarantees.

    Returns
    -------
    Tensor
        Float64, shape (out,): no feasible row has a smaller damped objective. For a budget
        of the whole layer shape (1,), a bound of the sum over the rows. Never negative,
        and zero if the damped gram is numerically singular.

    Raises
    ------
    InvalidProblemError
        For patterns of whole columns, whose rows are not independent.
    """
    if isinstance(problem.pattern, FixedMask):
        return _bound_on_mask(problem, problem.pattern.kept.to(problem.weight.device))
    if not isinstance(problem.pattern, Unstructured | NM):
        message = (
            f"lower bounds are for 0.5, n:m and fixed masks, not for {problem.pattern}: "
            "with whole columns the rows share one choice"
        )
        raise InvalidProblemError(message)
    factor = problem.factor(torch.float64)
    if factor.raised:
        return _total(torch.zeros_like(problem.energy), problem.pattern)
    split = _SplitProblem(problem, weight)
    # the unconstrained minimum: the free weights, less what rounding left them to gain
    gain = factor.inverse_norms(residual(problem, split.minimizer))
    best = _total(split.base - 2 * gain - split.rounding, problem.pattern).clamp(min=0)
    for bound in split.bounds():
        best = torch.maximum(best, bound)
    return best


def proven_gap(problem: LayerProblem, solution: Solution) -> Certificate:
    """Largest share of a solution's damped objective that any other answer could save.

    Parameters
    ----------
    problem
        The problem at the damping that was used.
    solution
        Its weights are judged, and their mask starts the search for the bound.

    Returns
    -------
    Certificate
        Of kind ``"optimum"``: ``(objective - lower bound) / objective``, summed over rows;
        1 if nothing is proven and 0 if the answer is the best one.
    """
    value = float(objective_rows(problem, solution.weight, damped=True).sum())
    bound = float(lower_bounds(problem, solution.weight).sum())
    gap = max(0.0, 1 - bound / value) if value > 0 else 0.0
    return Certificate("optimum", gap, "damped objective of the answer")


class _SplitProblem:
    """The problem around its free minimiser, columns scaled by powers of two.

    The scaling is exact and brings the diagonal of the gram near one, so that a margin on
    it is a margin in norm.
    """

    def __init__(self, problem: LayerProblem, weight: Tensor | None) -> None:
        self.pattern = problem.pattern
        dense = problem.weight.double()
        free = dense
        if problem.shift is not None:
            free = dense + problem.factor(torch.float64).solve_rows(problem.shift)
        gram = problem.damped_gram(torch.float64)
        scale = torch.exp2(-(gram.diagonal().log2() / 2).round())
        self.gram = gram * scale * scale[:, None]
        self.minimizer, self.free = free, free / scale
        self.left = residual(problem, free) * scale  # what rounding left of the gradient
        change = ((dense - free) / scale).abs()
        moved = change @ self.gram.abs()
        if problem.shift is not None:
            moved = moved + problem.shift.abs() * scale
        self.moved = moved
        self.base = objective_rows(problem, free, damped=True)
        unit = (len(gram) + 8) * EPSILON
        self.rounding = unit * (2 * (change * moved).sum(dim=1) + problem.drift)
        if weight is None:
            weight = torch.where(self.pattern.mask(self.free.abs()), free, 0)
        self.start = weight.double() / scale

    def bounds(self) -> Iterator[Tensor]:
        """Bounds from splits and directions, each valid."""
        largest = proven_split(self.gram, smallest_share(self.gram, 1))
        split = None if largest is None else INSIDE * largest
        directions = []
        for index in range(ROUNDS):
            if split is None:
                return
            direction, importance = self._relaxed(split[:, 0, 0])
            directions.append(direction)
            yield self.evaluate(split, direction)
            # the best bound is concave in D, with `importance` as its slope: Frank-Wolfe
            better = weighted_split(self.gram, split[:, 0, 0], importance)[:, None, None]
            split = proven_split(self.gram, torch.lerp(split, better, 1 / (index + 2)))
        assert largest is not None
        yield self.evaluate(largest, directions[0])
        pattern = self.pattern
        if isinstance(pattern, NM) and comb(pattern.m, pattern.n) <= LARGEST_COUNT:
            blocks = proven_split(self.gram, smallest_share(self.gram, pattern.m))
            if blocks is not None:
                for direction in directions:
                    yield self.evaluate(blocks, direction)

    def _relaxed(self, diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Direction y of the relaxation, and what each entry of D would add to it."""
        root = diagonal.sqrt()
        left = remainder(self.gram, diagonal[:, None, None]) / root / root[:, None]
        weight, start = self.free * root, self.start * root
        size = weight.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        relaxed = relax(
            left.float(), (weight / size).float(), (start / size).float(), self.pattern
        )
        importance = relaxed.importance / diagonal
        importance = importance + 1e-3 * importance.mean()
        return relaxed.direction.double() * size / root, importance

    def evaluate(self, split: Tensor, direction: Tensor) -> Tensor:
        """Bound for one split and one y per row, less its rounding."""
        left = remainder(self.gram, split)
        image = direction @ left
        pull = image - self.left
        reach = direction.abs() @ left.abs() + self.left.abs() + self.moved
        step = _times_blocks(pull, torch.linalg.inv(split))
        centre = self.free - step
        separable, magnitude = _smallest(centre, split, self.pattern)
        taken = (pull * step).sum(dim=1)
        value = self.base - (direction * image).sum(dim=1) - taken + separable
        unit = (len(left) + 8) * EPSILON
        sizes = direction.abs() + 2 * (centre.abs() + self.free.abs() + step.abs())
        rounding = (reach * sizes).sum(dim=1)
        rounding += _condition(split) * (taken.abs() + magnitude)
        rounding += _condition(split) * _quadratic(self.free, split)
        value = value - 4 * unit * rounding - self.rounding
        return _total(value, self.pattern)


def _smallest(centre: Tensor, split: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Minimum over masks of ``(v - t) D (v - t)^T``, and the size of its terms; (out,)."""
    if split.shape[1] == 1:
        gains = centre.square() * split[:, 0, 0]
        lost = torch.where(pattern.mask(gains), 0, gains)
        return lost.sum(dim=1), gains.sum(dim=1)
    assert isinstance(pattern, NM)
    blocks = centre.reshape(len(centre), -1, pattern.m)
    inverse = torch.linalg.inv(split)
    best = torch.full_like(blocks[:, :, 0], torch.inf)
    for gone in combinations(range(pattern.m), pattern.m - pattern.n):
        # the kept rest follows: what is left of D is the inverse of a block of its inverse
        chosen = torch.tensor(gone, dtype=torch.long, device=split.device)
        rest = torch.linalg.inv(inverse[:, chosen[:, None], chosen])
        part = blocks[:, :, chosen]
        lost = torch.einsum("rbp,bpq,rbq->rb", part, rest, part)
        best = torch.minimum(best, lost)
    return best.sum(dim=1), _quadratic(centre, split)


def _bound_on_mask(problem: LayerProblem, kept: Tensor) -> Tensor:
    """Objective of the best weights on the mask, less what they may still gain; (out,).

    Cost: one factorization per row, O(out in^3), in float64.
    """
    factor = problem.factor(torch.float64)
    if factor.raised:
        return torch.zeros_like(problem.energy)
    gram, width = problem.damped_gram(torch.float64), problem.shape[1]
    eye = torch.eye(width, dtype=torch.float64, device=gram.device)
    weight = torch.where(kept, problem.weight.double(), 0)
    for _ in range(2):  # the second step corrects the rounding of the first
        slope = torch.where(kept, residual(problem, weight), 0)
        steps = []
        for rows, on in _chunks(slope, kept, width):
            matrices = torch.where(on[:, :, None] & on[:, None, :], gram, eye)
            lower = torch.linalg.cholesky(matrices)
            steps.append(torch.cholesky_solve(rows[:, :, None], lower)[:, :, 0])
        weight = weight + torch.cat(steps)
    slope = torch.where(kept, residual(problem, weight), 0)
    value = objective_rows(problem, weight, damped=True)
    change = (problem.weight.double() - weight).abs()
    moved = change @ gram.abs()
    if problem.shift is not None:
        moved += 2 * problem.shift.abs()
    rounding = (change * moved).sum(dim=1) + problem.drift
    rounding *= 4 * (width + 8) * EPSILON
    return (value - 2 * factor.inverse_norms(slope) - rounding).clamp(min=0)


def _chunks(rows: Tensor, kept: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK_NUMBERS // width**2)
    yield from zip(torch.split(rows, size), torch.split(kept, size), strict=True)


def _total(rows: Tensor, pattern: Pattern) -> Tensor:
    return rows.sum(0, keepdim=True) if has_one_budget(pattern) else rows


def _times_blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    """``rows @ B`` for a block diagonal B."""
    size = blocks.shape[1]
    parts = rows.reshape(len(rows), -1, size)
    return torch.einsum("rbp,bpq->rbq", parts, blocks).reshape(rows.shape)


def _quadratic(rows: Tensor, blocks: Tensor) -> Tensor:
    return (rows * _times_blocks(rows, blocks)).sum(dim=1)


def _condition(blocks: Tensor) -> float:
    """Largest squared condition number: what inverses of blocks of inverses amplify."""
    values = torch.linalg.eigvalsh(blocks)
    return float((values[:, -1] / values[:, 0]).max()) ** 2

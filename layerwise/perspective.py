r"""Best point of the perspective relaxation, for all rows at once.

Let ``H = D + R``, in coordinates in which D is the identity, and let w be the unconstrained
minimiser. Then the relaxation of a sparse quadratic is

.. math:: \min_{v, z}\ (v - w) R (v - w)^\top + \sum_j \Bigl(\frac{v_j^2}{z_j} - 2 w_j v_j
   + w_j^2\Bigr), \qquad 0 \le z \le 1,\ \sum_j z_j = k \text{ in every group}.

ADMM alternates between two parts. The part with R is a product with an inverse that all
rows share. The sum has a closed form with one unknown number per group. The answers only
have to be near the best, because any ``v - w`` gives a valid bound, see
:mod:`layerwise.lower_bounds`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.patterns import NM, Pattern, Unstructured

ITERATIONS = 20
PENALTY = 3.0  # of ADMM; D is the identity
CHECK_EVERY = 10  # iterations between two estimates of the bound
ROOT_STEPS = 4  # per iteration, from the root of the iteration before
RELAXATION = 1.6
TINY = 1e-30  # floor of divisors: smaller than all entries that are not zero
SMALLEST_SHARE = 1e-6  # floor of z in the importance, where 1 / z would diverge


@dataclass(frozen=True, eq=False)
class Relaxed:
    """Best point found, as its direction ``y = v - w``, and the importance of each d_j."""

    direction: Tensor  # (out, in)
    importance: Tensor  # slope of the bound in d, (in,), float64: sum of v^2 (1 / z - 1)


def shared_inverse(remainder: Tensor) -> Tensor:
    """``p (R + p I)^-1`` for penalty p, (in, in), float64: the matrix of the ADMM steps."""
    shifted = remainder.clone()
    shifted.diagonal().add_(PENALTY)
    return torch.cholesky_inverse(torch.linalg.cholesky(shifted)).mul_(PENALTY)


def relax(
    inverse: Tensor,  # (in, in)
    weight: Tensor,  # (out, in)
    start: Tensor,  # (out, in)
    pattern: Pattern,
) -> Relaxed:
    """Solve the relaxation approximately, in the precision of the weight.

    `inverse` comes from :func:`shared_inverse`, in the precision of the products. ADMM
    begins at `start`. Cost: one (out, in, in) product per iteration.
    """
    sparse, dual = start, torch.zeros_like(start)
    root, share = None, torch.ones_like(start)
    best: Tensor | None = None
    direction = sparse - weight
    for iteration in range(1, ITERATIONS + 1):
        pull = sparse - dual - weight
        change = _times(pull, inverse)
        if iteration % CHECK_EVERY == 0:
            slope = PENALTY * (pull - change)  # change R, without a product
            value = _bound(change, slope, weight, pattern)[:, None]
            better = torch.ones_like(value) > 0 if best is None else value > best
            best = value if best is None else torch.maximum(value, best)
            direction = torch.where(better, change, direction)
        mixed = RELAXATION * (weight + change) + (1 - RELAXATION) * sparse
        centre = weight + PENALTY * (mixed + dual)
        share, root = _shares(centre, pattern, root)
        sparse = centre * share / (1 + PENALTY * share)
        dual = dual + mixed - sparse
    spread = sparse.square() * (1 / share.clamp(min=SMALLEST_SHARE) - 1)
    return Relaxed(direction, spread.sum(dim=0, dtype=torch.float64))


def _times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Product in the precision of the matrix, with sums in the precision of the rows."""
    if matrix.dtype == rows.dtype:
        return rows @ matrix
    return torch.mm(rows.to(matrix.dtype), matrix, out_dtype=rows.dtype)


def has_one_budget(pattern: Pattern) -> bool:
    """Whether all rows share one budget, and so one bound."""
    return isinstance(pattern, Unstructured) and pattern.group == "layer"


def _bound(change: Tensor, slope: Tensor, weight: Tensor, pattern: Pattern) -> Tensor:
    """Bound for the direction `change`, with ``slope = change R``; (out,) or (1,)."""
    gains = (weight - slope).square()
    lost = torch.where(pattern.mask(gains), 0, gains)
    rows = (lost - slope * (slope + change)).sum(dim=1)
    return rows.sum(0, keepdim=True) if has_one_budget(pattern) else rows


def _shares(
    centre: Tensor, pattern: Pattern, root: Tensor | None
) -> tuple[Tensor, Tensor]:  # (out, in), (groups, 1)
    """Maximise ``sum c^2 z / (1 + p z)`` over z in [0, 1] with sum k, for penalty p.

    The solution is ``z = clip((|c| t - 1) / p, 0, 1)`` with one t per group. The sum of z
    is piecewise linear in t. Newton steps with a bracket, from the t of the iteration
    before, find the t at which the sum is k.
    """
    sizes = _grouped(centre, pattern).abs()
    kept = _kept(pattern, sizes.shape[1])
    low = 1 / sizes.amax(dim=1, keepdim=True).clamp(min=TINY)
    high = torch.full_like(low, torch.inf)
    if root is None:
        root = (1 + PENALTY) / sizes.mean(dim=1, keepdim=True).clamp(min=TINY)
    root = torch.maximum(root, low)
    rounding = torch.finfo(sizes.dtype).eps * sizes.shape[1]  # of a sum of shares
    for _ in range(ROOT_STEPS):
        raw = (sizes * root - 1) / PENALTY
        share = raw.clamp(0, 1)
        excess = share.sum(dim=1, keepdim=True) - kept
        low = torch.where(excess < 0, root, low)
        high = torch.where(excess > 0, root, high)
        slope = torch.where(raw == share, sizes, 0).sum(dim=1, keepdim=True) / PENALTY
        step = root - excess / slope.clamp(min=TINY)
        middle = torch.where(torch.isinf(high), 2 * low, (low + high) / 2)
        inside = (step > low) & (step < high)
        solved = excess.abs() <= rounding  # a further step could leave the bracket
        root = torch.where(solved, root, torch.where(inside, step, middle))
    share = ((sizes * root - 1) / PENALTY).clamp(0, 1)
    return share.view_as(centre), root


def _grouped(matrix: Tensor, pattern: Pattern) -> Tensor:
    """Matrix with one group of the pattern per row."""
    if isinstance(pattern, NM):
        return matrix.reshape(-1, pattern.m)
    return matrix.reshape(1, -1) if has_one_budget(pattern) else matrix


def _kept(pattern: Pattern, size: int) -> int:
    """Number of weights that a group of this size keeps."""
    if isinstance(pattern, NM):
        return pattern.n
    assert isinstance(pattern, Unstructured)
    return size - pattern.removed(size)

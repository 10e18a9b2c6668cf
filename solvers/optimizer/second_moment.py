"""Factors ``Q U^T`` of second moments, with the smallest rank that is accurate enough.

Problem: given a stack of matrices V >= 0 (b, s, t) with s <= t, and factors of the same
matrices from the previous step, find for each the smallest rank k between two bounds whose
error rate ``||V - Q U^T|| / ||V||`` is at most a threshold.

The published rule tries one rank after the other, each from a random start. Here the start
is ``V^T Q`` with the previous Q, and one iteration is enough, because V changes little from
step to step. (The previous U would save one product, but does not depend on the new V; its
error is up to a third larger.) With a few random columns more, a rotation by singular
values gives the error rate of *every* smaller rank at once, so the rank shrinks without
another try. It doubles where it must grow.

References
----------
.. [1] P. Zhao, P. Li, Y. Gu, Y. Zheng, S. L. Kölker, Z. Wang, X. Yuan, "Adapprox: Adaptive
   Approximation in Adam Optimization via Randomized Low-Rank Matrices", 2024,
   arXiv:2403.14958, algorithm 2.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.solvers.optimizer.subspace import (
    by_singular_value,
    error_rates,
    scaled,
    subspace_iteration,
)

# Growth of the published rule, as far as its constants are known: 7 columns at an error
# rate of 0.01, 91 at 0.25, 190 at 1.
ETA, OMEGA, PHI, TAU = 200.0, 10.0, 2.5, -9.0

Draw = Callable[[int, int, int], Tensor]  # matrix, columns present, columns needed


@dataclass(frozen=True)
class RankRule:
    """Rule for the choice of ranks and the update of factors.

    Parameters
    ----------
    smallest, largest
        Bounds of the rank.
    threshold
        Error rate that is accurate enough.
    oversampling
        Random columns in addition to the rank.
    iterations
        Subspace iterations from a random start.
    warm_start
        Start from the previous factors, with one iteration.
    """

    smallest: int
    largest: int
    threshold: float
    oversampling: int
    iterations: int
    warm_start: bool


def update(
    V: Tensor,  # (b, s, t)
    Q: Tensor,  # (b, s, k), of the previous step
    rule: RankRule,
    draw: Draw,
) -> tuple[Tensor, Tensor]:  # (b, s, k), (b, t, k)
    """Factors of the same rank."""
    rank = Q.shape[-1]
    if rule.warm_start:
        start = V.mT @ Q
        return subspace_iteration(V, rank, oversampling=0, iterations=1, start=start)
    width = min(rank + rule.oversampling, V.shape[-2])
    start = _widened(V.mT[..., :0], range(len(V)), width, draw)
    return subspace_iteration(
        V,
        rank,
        oversampling=rule.oversampling,
        iterations=rule.iterations,
        start=start,
    )


def select(
    V: Tensor,  # (b, s, t)
    Q: Tensor | None,  # (b, s, k), of the previous step
    rule: RankRule,
    draw: Draw,
) -> list[tuple[Tensor, Tensor]]:  # (s, k), (t, k) of every matrix
    """Factors of the smallest rank that is accurate enough, or of the largest allowed.

    Matrices that need a larger rank are tried again together. Every try transfers error
    rates to the host once.
    """
    selected: dict[int, tuple[Tensor, Tensor]] = {}
    warm = rule.warm_start and Q is not None
    nothing = V.mT[..., :0]
    known = V.mT @ Q if rule.warm_start and Q is not None else nothing
    rank, iterations = max(known.shape[-1], rule.smallest), 1 if warm else rule.iterations
    tries = [(rank, list(range(len(V))), known)]
    while tries:
        rank, members, known = tries.pop()
        stack = V if len(members) == len(V) else V[members]
        width = min(rank + rule.oversampling, V.shape[-2])
        start = _widened(known, members, width, draw)
        left, right = subspace_iteration(
            stack, width, oversampling=0, iterations=iterations, start=start
        )
        # the published rule checks one rank, because its columns are not ordered
        ranks: Sequence[int] = [rank]
        if rule.warm_start:
            left, right = by_singular_value(left, right)
            ranks = range(rule.smallest, min(width, rule.largest) + 1)
        again: dict[int, list[int]] = {}
        for index, rates in enumerate(error_rates(stack, right).tolist()):
            last = rule.largest if ranks[-1] == rule.largest else None
            chosen = next((k for k in ranks if rates[k - 1] <= rule.threshold), last)
            if chosen is None:
                grown = 2 * width if rule.warm_start else rank + growth(rates[rank - 1])
                again.setdefault(min(grown, rule.largest), []).append(index)
            else:  # copies, so that the dropped columns are freed
                factors = left[index, :, :chosen].clone(), right[index, :, :chosen].clone()
                selected[members[index]] = factors
        for rank, indices in again.items():
            kept = right[indices] if rule.warm_start else nothing[indices]
            tries.append((rank, [members[index] for index in indices], kept))
        iterations = rule.iterations  # most columns of a grown basis are random
    return [selected[member] for member in range(len(V))]


def growth(error_rate: float) -> int:
    """Number of columns that the published rule adds: a sigmoid of the error rate."""
    return max(1, math.ceil(ETA / (1 + math.exp(PHI - OMEGA * error_rate)) + TAU))


def _widened(
    known: Tensor, members: Sequence[int], width: int, draw: Draw
) -> Tensor:  # (b, t, width)
    """Known columns, followed by random ones up to a width."""
    present = known.shape[-1]
    if present >= width:
        return known[..., :width]
    drawn = torch.stack([draw(member, present, width) for member in members])
    return torch.cat([scaled(known), drawn.to(known)], dim=-1)

r"""Searches for the columns to keep: greedy removal, and exchanges until none helps.

Both use the exact damped objective after every step, with all weights refitted
(:mod:`layerwise.solvers.column.support`).

References
----------
.. [1] B. Hassibi, D. Stork, "Second Order Derivatives for Network Pruning: Optimal Brain
   Surgeon", NIPS 1992, equation 5 (here for whole columns, that is, all rows at once).
.. [2] A. J. Miller, "Subset Selection in Regression", 2nd edition, 2002, chapter 3
   (backward elimination and sequential replacement).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from layerwise.solvers.column.support import ColumnSupport, Exchanges

TOLERANCE = 1e-6  # of the objective: smallest improvement worth an exchange
PAIRS = 1 << 22  # entries of an array in a comparison of exchanges


def removal_path(
    support: ColumnSupport,
    heads: Tensor,  # (units,)
    quotas: Tensor,  # (heads,)
    step: int,
) -> Tensor:
    """Remove the cheapest unit again and again, always refitted; return their order.

    With several heads, a round removes one unit of every head, so that every round ends
    with equal counts.

    Parameters
    ----------
    support
        Kept columns at the start, usually all of them; changed to those at the end.
    heads
        Head of each unit.
    quotas
        Number of units to remove from each head.
    step
        Number of units to remove together, by their separate costs; with several heads
        they are of different heads.
    """
    several, order = len(quotas) > 1, []
    for index in range(int(quotas.max()) if several else 1):
        missing = (quotas > index).long() if several else quotas.clone()
        while bool((missing > 0).any()):
            open_units = support.kept & (missing > 0)[heads]
            costs = support.changes().masked_fill(~open_units, torch.inf)
            ranked = costs.argsort(stable=True)[: int(open_units.sum())]
            if several:
                ranked = ranked[_first_of_each(heads[ranked])]
            chosen = ranked[: min(step, int(missing.sum()))]
            support.flip(chosen)
            missing.index_add_(0, heads[chosen], torch.full_like(chosen, -1))
            order.append(chosen)
    return torch.cat(order) if order else heads.new_zeros(0)


def exchange_until_none_helps(
    support: ColumnSupport,
    heads: Tensor,  # (units,)
    step: int,
    rounds: int,
    noise: float,
) -> Iterator[dict[str, float]]:
    """Exchange removed units for kept ones of their head; yield the figures of each round.

    A round carries out the best exchange, or up to `step` of the best together as long as
    they gain at least as much as the best alone. The objective falls with every round.

    Parameters
    ----------
    support
        Kept columns at the start; changed to the best set.
    heads
        Head of each unit.
    step
        Largest number of exchanges in a round.
    rounds
        Largest number of rounds.
    noise
        Improvements below this are rounding.
    """
    together = step
    for _ in range(rounds):
        smallest = max(TOLERANCE * support.objective, noise)
        exchanges = _best_exchanges(support, heads, smallest)
        if exchanges is None:
            return
        distinct = _first_of_each(exchanges.leaving)[:together]
        entering, leaving = exchanges.entering[distinct], exchanges.leaving[distinct]
        change = support.flip(entering) + support.flip(leaving)
        if len(distinct) > 1 and change > float(exchanges.change[0]):
            support.flip(leaving)
            support.flip(entering)
            together = max(1, together // 2)
            continue
        yield {"objective": support.objective, "exchanges": len(distinct)}


def _best_exchanges(
    support: ColumnSupport, heads: Tensor, smallest: float
) -> Exchanges | None:
    """Exchanges that gain more than `smallest`, the best first; None if there are none.

    The gain of an exchange is at most the gain of its entering unit alone. Units are tried
    in the order of these gains, until the best exchange beats all remaining units.
    """
    gains = -support.changes()
    removed = (~support.kept).nonzero()[:, 0]
    removed = removed[gains[removed].argsort(descending=True, stable=True)]
    kept = int(support.kept.sum()) * support.unit_size**2
    parts: list[Exchanges] = []
    best = smallest
    for units in torch.split(removed, max(1, PAIRS // max(1, kept))):
        if len(units) == 0 or float(gains[units[0]]) <= best:
            break
        parts.append(support.exchanges(units, heads))
        best = max(best, -float(parts[-1].change[0]))
    if not parts:
        return None
    change = torch.cat([part.change for part in parts])
    order = change.argsort(stable=True)[: int((change < -smallest).sum())]
    if len(order) == 0:
        return None
    entering = torch.cat([part.entering for part in parts])
    leaving = torch.cat([part.leaving for part in parts])
    return Exchanges(entering[order], leaving[order], change[order])


def _first_of_each(labels: Tensor) -> Tensor:
    """Positions at which a label occurs for the first time, ascending."""
    order = labels.argsort(stable=True)
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = labels[order].diff() != 0
    return order[first].sort().values

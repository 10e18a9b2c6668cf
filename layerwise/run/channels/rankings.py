r"""Allocation by the rules of the papers: ratios and rankings of scores.

These rules serve as a comparison for :func:`layerwise.run.channels.allocate.allocate`,
which minimises the error instead. FLAP names its rules by layers (uniform UL, adaptive AL)
and by modules (uniform UM, manual MM, adaptive AM); UL-UM is :func:`uniform`.

The adaptive rules rank units of different layers by one number. The scores of the channels
of a layer are standardised, ``z = (s - mean) / std`` with the unbiased deviation. A unit of
several channels, such as a head, has their mean. Costs come from the model: a head of an
MHA LLaMA costs 512/3 neurons, the constant of the published code.

References
----------
.. [1] Y. An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language
   Models", AAAI 2024, arXiv:2312.11983, section 3 (adaptive structure search).
.. [2] "FASP: Fast and Accurate Structured Pruning of Large Language Models",
   arXiv:2501.09412 (queries and keys are not pruned, the rest is pruned more).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from layerwise.errors import UsageError

HEADS = "heads"  # the kind whose scores the published code squares


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one structure of one layer.

    Parameters
    ----------
    name
        Unique name, such as ``"model.layers.0.mlp"``.
    layer
        Block of the structure.
    kind
        ``"mlp"``, ``"heads"``, ...
    scores
        Larger = keep; shape (units,), or (units, channels) where a unit has several. With
        grouped queries a unit is a head of keys and values with all its queries.
    cost
        Cost that one removed unit saves.
    """

    name: str
    layer: str
    kind: str
    scores: Tensor
    cost: float

    def __post_init__(self) -> None:
        scores = self.scores.detach().double().cpu()
        scores = scores[:, None] if scores.dim() == 1 else scores
        object.__setattr__(self, "scores", scores)
        if scores.dim() != 2 or not scores.numel() or not bool(scores.isfinite().all()):
            message = (
                f"{self.name}: scores must be finite, of shape (units,) or (units, "
                f"channels); got shape {tuple(self.scores.shape)}"
            )
            raise UsageError(message)
        if not (math.isfinite(self.cost) and self.cost > 0):
            message = f"{self.name}: a unit costs {self.cost}, expected a number above zero"
            raise UsageError(message)

    @property
    def count(self) -> int:
        """Number of units."""
        return self.scores.shape[0]

    @property
    def total(self) -> float:
        """Cost of all units."""
        return self.count * self.cost

    def standardised(self, *, squared: bool = False) -> Tensor:
        """Mean standardised score of every unit, shape (units,); zero if all are equal."""
        scores = self.scores.square() if squared else self.scores
        centred = scores - scores.mean()
        # round-off of the mean does not count as deviation
        noise = scores.abs().max() * torch.finfo(scores.dtype).eps * scores.numel()
        if scores.numel() < 2 or bool(centred.abs().max() <= noise):
            return torch.zeros(self.count, dtype=scores.dtype)
        return (centred / scores.std()).mean(dim=1)


def uniform(units: Sequence[Units], fraction: float | Fraction) -> dict[str, int]:
    """FLAP's UL-UM: remove the floor of the same fraction of units everywhere.

    Parameters
    ----------
    units
        The structures.
    fraction
        Share of the units to remove, in [0, 1), so that at least one unit is kept.
    """
    share = _share(fraction)
    return {u.name: int(share * u.count) for u in units}


def raised_fraction(
    units: Sequence[Units], fraction: float | Fraction, total: float
) -> Fraction:
    """Fraction of the prunable cost that equals `fraction` of the total: FASP's rule.

    OPT without its queries and keys has 10/12 of its parameters, so 20 % becomes 24 %.

    Parameters
    ----------
    units
        The structures that can be pruned.
    fraction
        Share of `total` to remove, in [0, 1).
    total
        Total cost, such as all parameters of the blocks.
    """
    prunable = sum(Fraction(u.cost) * u.count for u in units)
    raised = _share(fraction) * Fraction(total) / prunable
    if raised >= 1:
        message = (
            f"{float(fraction):g} of {total:g} is out of reach: only {float(prunable):g} "
            f"can be pruned; ask for less than {float(prunable) / total:.4g}"
        )
        raise UsageError(message)
    return raised


def fasp(
    units: Sequence[Units], fraction: float | Fraction, total: float
) -> dict[str, int]:
    """FASP: :func:`uniform` with a fraction raised for the parameters that stay dense."""
    return uniform(units, raised_fraction(units, fraction, total))


def ul_mm(
    units: Sequence[Units], fraction: float | Fraction, manual: Mapping[str, int]
) -> dict[str, int]:
    """FLAP's UL-MM: given counts for some kinds; one kind makes up the rest of a layer.

    Parameters
    ----------
    units
        The structures; exactly one kind is not in `manual`.
    fraction
        Share of the cost of every layer to remove, in [0, 1).
    manual
        Units to remove over all layers, by kind; every layer loses the floor of the mean.
    """
    free = _free_kind(units, manual)
    removed: dict[str, int] = {}
    for layer in dict.fromkeys(u.layer for u in units):
        inside = [u for u in units if u.layer == layer]
        rest = _share(fraction) * sum(Fraction(u.cost) * u.count for u in inside)
        for u in inside:
            if u.kind in manual:
                layers = sum(other.kind == u.kind for other in units)
                removed[u.name] = min(manual[u.kind] // layers, u.count - 1)
                rest -= removed[u.name] * Fraction(u.cost)
        for u in inside:
            if u.kind == free:
                removed[u.name] = min(_affordable(rest, u.cost, free), u.count - 1)
    return {u.name: removed[u.name] for u in units}


def al_mm(
    units: Sequence[Units], fraction: float | Fraction, manual: Mapping[str, int]
) -> dict[str, int]:
    """FLAP's AL-MM: totals by kind as in :func:`ul_mm`, with rankings over all layers.

    Parameters
    ----------
    units
        The structures; exactly one kind is not in `manual`.
    fraction
        Share of the whole cost to remove, in [0, 1).
    manual
        Units to remove over all layers, by kind.
    """
    free = _free_kind(units, manual)
    rest = _share(fraction) * sum(Fraction(u.cost) * u.count for u in units)
    removed: dict[str, int] = {}
    for kind, count in manual.items():
        members = [u for u in units if u.kind == kind]
        chosen = _ranking(members)[:count]
        removed |= _counted(members, chosen)
        rest -= sum(removed[u.name] * Fraction(u.cost) for u in members)
    members = [u for u in units if u.kind == free]
    cost = max(u.cost for u in members)
    removed |= _counted(members, _ranking(members)[: _affordable(rest, cost, free)])
    return {u.name: removed[u.name] for u in units}


def al_am(
    units: Sequence[Units], fraction: float | Fraction, *, compat: bool = False
) -> dict[str, int]:
    """FLAP's AL-AM: one ranking of all units, cut at the cost closest to the target.

    Parameters
    ----------
    units
        The structures.
    fraction
        Share of the whole cost to remove, in [0, 1).
    compat
        Choose as the published code does: scores of heads are squared once more, and a unit
        is kept only strictly above the threshold, so that the unit at the threshold and its
        ties are removed as well. One unit of each structure is kept even then.

    Raises
    ------
    UsageError
        If the target cannot be reached with one unit of each structure kept.
    """
    total = sum(u.total for u in units)
    target = float(_share(fraction)) * total
    most = sum(u.total - u.cost for u in units)
    if target > most:
        message = (
            f"{float(fraction):g} of {total:g} is out of reach: one unit of each structure "
            f"is kept, so at most {most:g} can be removed"
        )
        raise UsageError(message)
    if compat:
        return _published_cut(units, total - target)
    ranking = _ranking(units)
    costs = [0.0, *(units[owner].cost for owner in ranking)]
    distance = (torch.tensor(costs, dtype=torch.float64).cumsum(0) - target).abs()
    return _counted(units, ranking[: int(distance.argmin())])


def _published_cut(units: Sequence[Units], kept_cost: float) -> dict[str, int]:
    z = [u.standardised(squared=u.kind == HEADS) for u in units]
    scores = torch.cat(z)
    costs = torch.cat([torch.full_like(s, u.cost) for s, u in zip(z, units, strict=True)])
    scores, order = scores.sort(descending=True, stable=True)
    threshold = scores[(costs[order].cumsum(0) - kept_cost).abs().argmin()]
    return {
        u.name: min(int((s <= threshold).sum()), u.count - 1)
        for u, s in zip(units, z, strict=True)
    }


def _ranking(units: Sequence[Units]) -> list[int]:
    """Structure of every unit that may be removed, the least important first.

    The best unit of each structure is always kept, so it is not in the ranking.
    """
    z = [u.standardised().sort(stable=True).values[:-1] for u in units]
    owner = torch.cat([torch.full(s.shape, index) for index, s in enumerate(z)])
    order = torch.cat(z).argsort(stable=True)
    ranking: list[int] = owner[order].tolist()
    return ranking


def _counted(units: Sequence[Units], chosen: Sequence[int]) -> dict[str, int]:
    counts = torch.bincount(torch.tensor(chosen, dtype=torch.int64), minlength=len(units))
    return {u.name: int(n) for u, n in zip(units, counts, strict=True)}


def _share(fraction: float | Fraction) -> Fraction:
    """The fraction as written, without binary rounding."""
    if not 0 <= fraction < 1:
        message = f"the fraction to remove must lie in [0, 1), got {float(fraction):g}"
        raise UsageError(message)
    return fraction if isinstance(fraction, Fraction) else Fraction(repr(float(fraction)))


def _free_kind(units: Sequence[Units], manual: Mapping[str, int]) -> str:
    kinds = list(dict.fromkeys(u.kind for u in units))
    free = [kind for kind in kinds if kind not in manual]
    known = set(manual) <= set(kinds) and all(count >= 0 for count in manual.values())
    if len(free) != 1 or not known:
        message = (
            f"manual must give counts >= 0 for all kinds but one of {', '.join(kinds)}; "
            f"got {dict(manual)}"
        )
        raise UsageError(message)
    return free[0]


def _affordable(rest: Fraction, cost: float, kind: str) -> int:
    if rest < 0:
        message = (
            f"the manual counts alone exceed the budget, with nothing left for {kind}: "
            f"lower them or raise the fraction"
        )
        raise UsageError(message)
    return int(rest / Fraction(cost))

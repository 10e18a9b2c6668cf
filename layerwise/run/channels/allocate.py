"""Allocation of a budget over the whole model with the least summed error.

Every curve gives the error of a layer without 0, 1, 2, ... of its units. The allocation
removes at least `budget`, in the unit of the costs: parameters, bytes or operations. See
:mod:`layerwise.run.channels.knapsack` for the optimisation, and
:mod:`layerwise.run.channels.rankings` for the rules of the papers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.run.channels.knapsack import ROUNDING, Options, choose


@dataclass(frozen=True, eq=False)
class Curve:
    """Error of one structure of one layer, by the number of removed units.

    Parameters
    ----------
    name
        Unique name, such as ``"model.layers.0.mlp"``.
    kind
        Kind of the units, such as ``"mlp"`` or ``"heads"``; curves of one kind can be tied.
    errors
        Error after removing 0, 1, ..., k units, shape (k + 1,). Any finite numbers: a
        curve need not be convex or monotone.
    cost
        Cost that one removed unit saves, above zero.
    """

    name: str
    kind: str
    errors: Tensor | Sequence[float]
    cost: float

    def __post_init__(self) -> None:
        errors = torch.as_tensor(self.errors, dtype=torch.float64).detach().cpu()
        object.__setattr__(self, "errors", errors)
        if errors.dim() != 1 or len(errors) < 2:
            message = (
                f"{self.name}: errors must be a vector with an entry for 0, 1, ... removed "
                f"units, got shape {tuple(errors.shape)}"
            )
            raise UsageError(message)
        if not bool(torch.isfinite(errors).all()):
            count = int((~torch.isfinite(errors)).nonzero()[0])
            message = f"{self.name}: the error of removing {count} units is not finite"
            raise UsageError(message)
        if not (math.isfinite(self.cost) and self.cost > 0):
            message = f"{self.name}: a unit costs {self.cost}, expected a number above zero"
            raise UsageError(message)

    @property
    def units(self) -> int:
        """Number of units before the removal."""
        return len(self.errors) - 1


@dataclass(frozen=True)
class Allocation:
    """Numbers of units to remove.

    Parameters
    ----------
    removed
        Number of removed units by name of the curve.
    price
        Error per unit of cost for the next units that would be removed, by the linear
        relaxation. Times 1 % of the model, it is the error of removing 1 % more.
    cost
        Removed cost, at least the budget.
    error
        Sum of the errors of all curves at their counts.
    gap
        Largest possible distance of `error` from the optimum; 0 if it is proven optimal.
    """

    removed: dict[str, int]
    price: float
    cost: float
    error: float
    gap: float


def allocate(
    curves: Sequence[Curve],
    budget: float,
    *,
    tie: Literal["kind"] | None = None,
    multiple: int | Mapping[str, int] = 1,
) -> Allocation:
    """Remove at least `budget` with the least summed error: the optimum, not a heuristic.

    Parameters
    ----------
    curves
        One per structure of a layer.
    budget
        Least cost to remove. It is exceeded by less than one step of some curve.
    tie
        ``"kind"``: all curves of a kind lose the same number of units, as a stock
        configuration requires. They must have the same number of units.
    multiple
        Number that must divide the count of remaining units, unless all of them remain;
        kernels are faster at such widths. One number, or one per kind (1 for other kinds).

    Returns
    -------
    Allocation
        Every curve keeps at least one unit, or `multiple` units if it has that many.

    Raises
    ------
    UsageError
        If the curves cannot reach the budget; the message gives the largest possible one.
    """
    _check(curves, budget)
    groups = _tied(curves) if tie == "kind" else [[curve] for curve in curves]
    counts = [_counts(group[0], multiple) for group in groups]
    classes = [_options(group, kept) for group, kept in zip(groups, counts, strict=True)]
    most = sum(float(options.costs[-1]) for options in classes)
    if budget > most * (1 + ROUNDING):
        message = (
            f"a budget of {budget:g} is out of reach: at most {most:g} of "
            f"{sum(curve.units * curve.cost for curve in curves):g} can be removed"
        )
        raise UsageError(message)
    solution = choose(classes, budget)
    removed = {
        curve.name: int(kept[at])
        for group, kept, at in zip(groups, counts, solution.options, strict=True)
        for curve in group
    }
    return Allocation(
        removed={curve.name: removed[curve.name] for curve in curves},
        price=solution.price,
        cost=math.fsum(removed[curve.name] * curve.cost for curve in curves),
        error=math.fsum(float(curve.errors[removed[curve.name]]) for curve in curves),
        gap=solution.gap,
    )


def _check(curves: Sequence[Curve], budget: float) -> None:
    names = [curve.name for curve in curves]
    if not names:
        message = "an allocation needs at least one curve: give one"
        raise UsageError(message)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        message = f"two curves are called {twice!r}; names must differ"
        raise UsageError(message)
    if not (math.isfinite(budget) and budget >= 0):
        message = f"the budget must be a finite number >= 0, got {budget}"
        raise UsageError(message)


def _tied(curves: Sequence[Curve]) -> list[list[Curve]]:
    """Curves by kind, each with the same number of units."""
    kinds: dict[str, list[Curve]] = {}
    for curve in curves:
        kinds.setdefault(curve.kind, []).append(curve)
    for kind, members in kinds.items():
        for curve in members:
            if curve.units != members[0].units:
                message = (
                    f"{curve.name} has {curve.units} units and {members[0].name} has "
                    f"{members[0].units}: tied curves of kind {kind} need equal widths; "
                    f"allocate without tie"
                )
                raise UsageError(message)
    return list(kinds.values())


def _counts(curve: Curve, multiple: int | Mapping[str, int]) -> list[int]:
    """Numbers of units that may be removed, ascending from zero."""
    step = multiple if isinstance(multiple, int) else multiple.get(curve.kind, 1)
    if step < 1:
        message = f"multiple must be at least 1, got {step} for {curve.name}"
        raise UsageError(message)
    units = curve.units
    return [0, *(units - k for k in range(units // step * step, 0, -step) if k < units)]


def _options(group: Sequence[Curve], counts: Sequence[int]) -> Options:
    """Costs and errors of removing each of these counts from every curve of a group."""
    errors = sum(torch.as_tensor(curve.errors)[list(counts)] for curve in group)
    cost = math.fsum(curve.cost for curve in group)
    return Options(
        cost * np.array(counts, dtype=np.float64), torch.as_tensor(errors).numpy()
    )

"""How much to remove where: least summed error for a budget over the whole model.

Every curve says what it costs a layer to lose 0, 1, 2, ... units. The allocation takes at
least `budget` away, in parameters, bytes or operations: whatever the costs are in. See
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
    """Error of one structure of one layer by the number of units that are removed.

    Parameters
    ----------
    name
        Unique name, such as ``"model.layers.0.mlp"``.
    kind
        What is removed, such as ``"mlp"`` or ``"heads"``; curves of one kind can be tied.
    errors
        Error after removing 0, 1, ..., k units, shape (k + 1,). Any finite numbers: a
        curve need not be convex or monotone.
    cost
        What one unit saves, above zero.
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
                f"{self.name}: errors are those of removing 0, 1, ... units, got shape "
                f"{tuple(errors.shape)}"
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
        """Number of units that are there."""
        return len(self.errors) - 1


@dataclass(frozen=True)
class Allocation:
    """What to remove.

    Parameters
    ----------
    removed
        Number of units by name of the curve.
    price
        Marginal error of a unit of cost: slope of the optimum of the linear relaxation at
        the budget, from below. Multiply by 1 % of the model to see what 1 % more costs.
    cost
        Cost that is removed, at least the budget.
    error
        Sum of the errors of all curves at their counts.
    gap
        What `error` may lie above the optimum; 0 if it is proven to be the optimum.
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
    """Remove at least `budget` with the least summed error; the optimum, not a heuristic.

    Parameters
    ----------
    curves
        One per structure of a layer.
    budget
        Least cost to remove. It is exceeded by less than one step of some curve.
    tie
        ``"kind"``: all curves of a kind lose the same number of units, as a stock
        configuration needs it. They must have equally many.
    multiple
        What stays is a multiple of this number, or everything, so that kernels like the
        widths; one number, or one per kind (1 where a kind is absent).

    Returns
    -------
    Allocation
        At least one unit stays everywhere, and `multiple` units where there are as many.

    Raises
    ------
    UsageError
        If the curves cannot reach the budget; the message says what they can.
    """
    _check(curves, budget)
    groups = _tied(curves) if tie == "kind" else [[curve] for curve in curves]
    counts = [_counts(group[0], multiple) for group in groups]
    classes = [_options(group, kept) for group, kept in zip(groups, counts, strict=True)]
    most = sum(float(options.costs[-1]) for options in classes)
    if budget > most * (1 + ROUNDING):
        message = (
            f"a budget of {budget:g} is out of reach: {most:g} of "
            f"{sum(curve.units * curve.cost for curve in curves):g} can be removed at most"
        )
        raise UsageError(message)
    found = choose(classes, budget)
    removed = {
        curve.name: int(kept[at])
        for group, kept, at in zip(groups, counts, found.options, strict=True)
        for curve in group
    }
    return Allocation(
        removed={curve.name: removed[curve.name] for curve in curves},
        price=found.price,
        cost=math.fsum(removed[curve.name] * curve.cost for curve in curves),
        error=math.fsum(float(curve.errors[removed[curve.name]]) for curve in curves),
        gap=found.gap,
    )


def _check(curves: Sequence[Curve], budget: float) -> None:
    names = [curve.name for curve in curves]
    if not names:
        message = "there is nothing to allocate to: give at least one curve"
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
                    f"{members[0].units}: one count for every {kind} needs equal widths; "
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
    """Costs and errors of removing these counts from every curve of a group."""
    errors = sum(torch.as_tensor(curve.errors)[list(counts)] for curve in group)
    cost = math.fsum(curve.cost for curve in group)
    return Options(
        cost * np.array(counts, dtype=np.float64), torch.as_tensor(errors).numpy()
    )

"""Costs of the methods for one matrix: operations, bytes, and memory.

The figures were counted, by :class:`layerwise.timing.operations.OperationCount` and
:class:`layerwise.planning.dry.LiveBytes`, on random layers of several shapes. A matrix
costs the posing of its problem and the grading of its answer, once, and its method, or
every step of a chain. Iterative methods have the figures that were counted there; real
layers take between half and twice as much. Methods that are not here are in
:mod:`.counted_costs`, which one command counts again; a method with other options, or of a
user, is counted when it is asked for (:mod:`.count_costs`).
"""

from collections.abc import Mapping
from functools import cache, partial
from types import MappingProxyType
from typing import Any

from layerwise.configure import options_of
from layerwise.planning.costs import Cost, Costs
from layerwise.planning.count_costs import SMALL, costs_of
from layerwise.planning.counted_costs import COUNTED
from layerwise.planning.workspace import Peak, Workspace
from layerwise.solve import steps_of
from layerwise.solver import Solver

POSED = Costs(
    Cost(double=2, traffic=190),
    # the drift of a pair of streams is computed before the problem is posed
    Cost(double=3, traffic=335, peaks=(Peak(3.0, 1.0),)),
)
"""Posing a problem and grading its answer: once per matrix, whatever the steps."""
STORED = Costs(Cost(double=1, traffic=100), Cost(double=1, traffic=120))
"""Error of weights that were rounded to the type of the model."""
SCORES = Costs(
    Cost(0, 0, 0, 0, 0, 150, (Peak(0.7, 0.0, 3.9),)),
    Cost(0, 0, 0, 0, 0, 150, (Peak(1.7, 0.0, 3.9),)),
    keeps_weights=True,
)
# half a gram of the sweep is inside the factorization, where no tensor shows it
SWEEP = Costs(
    Cost(0, 0.65, 0, 0.34, 0, 410, (Peak(3.3, 1.5),)),
    Cost(0, 1.65, 0, 0.34, 0, 470, (Peak(4.5, 1.5),)),
)
REFIT = Costs(
    Cost(17, 2.4, 2.9, 0.33, 1.2, 4340, (Peak(1.2, 2.4, 11.0),)),
    Cost(17, 2.4, 4.4, 0.33, 1.2, 4570, (Peak(2.2, 2.4, 11.0), Peak(2.2, 0.1, 13.2))),
    iterative=True,
)
"""Refit by conjugate gradients, as a step after another method."""
SEARCH = Costs(
    Cost(17, 140, 18.8, 1.4, 1.6, 23400, (Peak(11.4, 2.0), Peak(5.3, 6.2, 6.4))),
    Cost(17, 140, 20.3, 1.4, 1.6, 25200, (Peak(13.7, 3.7), Peak(6.3, 6.2, 6.4))),
    iterative=True,
)
SEARCH_AS_PUBLISHED = Costs(
    Cost(0, 130, 7, 0.34, 0, 19400, (Peak(10.9, 1.5),)),
    Cost(0, 130, 8, 0.34, 0, 21200, (Peak(12.9, 1.5),)),
    iterative=True,
)
SPLITTING = Costs(
    Cost(0, 20, 0, 0.34, 2, 2270, (Peak(3.63, 2.5), Peak(1.0, 4.0))),
    Cost(0, 20, 0, 0.34, 2, 2580, (Peak(5.13, 2.5), Peak(2.5, 4.0))),
    iterative=True,
)
COSTS: Mapping[str, Costs] = MappingProxyType(
    {
        **COUNTED,
        "magnitude": SCORES,
        "wanda": SCORES,
        "ria": SCORES,
        "sparsegpt": SWEEP,
        "least-squares": REFIT,
        "fista": SEARCH,
        "fista-paper": SEARCH_AS_PUBLISHED,
        "admm": SPLITTING,
    }
)


def cost_of(solver: Solver, *, pair: bool) -> Cost | None:
    """Cost of a method or a chain for one matrix; None if it has no figures.

    Parameters
    ----------
    solver
        Configured method or chain.
    pair
        Whether the dense and the pruned model give the matrix different inputs.
    """
    total, keeps_weights = POSED.of(pair=pair), True
    for step in steps_of(solver):
        costs = _costs_of_step(step)
        if costs is None:
            return None
        total, keeps_weights = total.then(costs.of(pair=pair)), costs.keeps_weights
    return total if keeps_weights else total.then(STORED.of(pair=pair))


def _costs_of_step(step: Solver) -> Costs | None:
    """Known costs, or those that are counted now; None if the method cannot be counted."""
    options = {k: v for k, v in options_of(step).items() if k != "memory_budget"}
    known = COSTS.get(" ".join((step.name, *(f"{k}={v}" for k, v in options.items()))))
    if known is None and (plain := COSTS.get(step.name)) and not plain.iterative:
        known = plain
    if known is not None:
        return known
    try:
        hash(step)
    except TypeError:  # a user's method that can change
        return costs_of(step, SMALL)
    counted: Costs | None = _counted(step)
    return counted


_counted: Any = cache(partial(costs_of, shapes=SMALL))


def workspace_of(solver: Solver, *, pair: bool) -> Workspace | None:
    """Memory of a method while it solves one matrix; None if it has no figures."""
    cost = cost_of(solver, pair=pair)
    if cost is None:
        return None
    budgets = [getattr(step, "memory_budget", 0) for step in steps_of(solver)]
    return Workspace(cost.peaks, max(budgets) or Workspace.budget)

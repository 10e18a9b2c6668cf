"""What the methods cost for one matrix: operations, bytes, and memory.

The figures were counted, by :class:`layerwise.run.operations.OperationCount` and
:class:`layerwise.run.dry.LiveBytes`, on random layers of several shapes, everything
included: posing the problem, solving it, grading the answer. Methods that iterate until
they are done stand with what they took there; real layers take up to twice as much or as
little. A method that is not in the table has no figures, and none are made up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from layerwise.run.floor import Work
from layerwise.run.memory_model import Peak, StageShape, Workspace
from layerwise.run.recipe import options_of
from layerwise.solve import solver_name, steps_of


@dataclass(frozen=True)
class Cost:
    """Of one matrix (out, in), in units that follow its shape.

    Parameters
    ----------
    half, single, double
        Products of the matrix with the gram, 2 out in^2 operations each, in bfloat16,
        float32 and float64.
    cubic, cubic_double
        Factorizations, inverses and eigenvalues of the gram in units of in^3 operations,
        in float32 and float64; matrices that share their inputs share them.
    traffic
        Bytes that are read and written, per entry of the matrix.
    peaks
        Memory, see :class:`~layerwise.run.memory_model.Workspace`.
    """

    half: float = 0.0
    single: float = 0.0
    double: float = 0.0
    cubic: float = 0.0
    cubic_double: float = 0.0
    traffic: float = 0.0
    peaks: tuple[Peak, ...] = ()

    def then(self, other: "Cost") -> "Cost":
        """Both, one after the other: work adds up, memory is that of the larger."""
        return Cost(
            self.half + other.half,
            self.single + other.single,
            self.double + other.double,
            max(self.cubic, other.cubic),
            max(self.cubic_double, other.cubic_double),
            self.traffic + other.traffic,
            self.peaks + other.peaks,
        )

    def work(self, stage: StageShape) -> Work:
        """Operations and bytes for all matrices of a stage."""
        products = 2.0 * stage.weights * stage.width
        cubes = float(stage.width) ** 3
        return Work(
            {
                torch.bfloat16: self.half * products,
                torch.float32: self.single * products + self.cubic * cubes,
                torch.float64: self.double * products + self.cubic_double * cubes,
            },
            self.traffic * stage.weights,
        )


@dataclass(frozen=True)
class Costs:
    """Of a method, for inputs that both models share and for a pair of streams.

    Parameters
    ----------
    alone, pair
        With one stream of inputs, and with a dense and a pruned one.
    iterative
        Whether options of the method change what it takes, so that figures are only
        known for its defaults.
    """

    alone: Cost
    pair: Cost
    iterative: bool = False


SHARED = Peak(grams=4.0)  # averages of the sums, and their scaled copies, in the making
SCORES = Costs(
    Cost(0, 0, 4, 0, 0, 800, (SHARED, Peak(3.9))),
    Cost(0, 0, 9, 0, 0, 1400, (SHARED, Peak(8.7))),
)
"""Posing a problem, choosing a mask from scores, and grading the answer."""
SWEEP = Costs(
    Cost(0, 0.7, 4, 0.34, 0, 1100, (SHARED, Peak(4.0, 0.4))),
    Cost(0, 1.7, 9, 0.34, 0, 1700, (SHARED, Peak(8.0, 0.6))),
)
REFIT = Costs(
    Cost(31, 4.3, 6.2, 0.7, 0, 7300, (SHARED, Peak(1.5, 3.5, 8.5))),
    Cost(31, 4.3, 13, 0.7, 0, 8500, (SHARED, Peak(3.0, 4.0, 8.5))),
    iterative=True,
)
"""By conjugate gradients, as a step behind another method."""
SEARCH = Costs(
    Cost(31, 105, 23, 1.4, 0, 23000, (SHARED, Peak(10.5, 7.0))),
    Cost(31, 107, 35, 1.4, 0, 27000, (SHARED, Peak(13.9, 7.0))),
    iterative=True,
)
SEARCH_AS_PUBLISHED = Costs(
    Cost(0, 93, 10, 0.7, 0, 15000, (SHARED, Peak(10.9, 1.5))),
    Cost(0, 93, 15, 0.7, 0, 17000, (SHARED, Peak(12.9, 1.5))),
    iterative=True,
)
SPLITTING = Costs(
    Cost(0, 20, 4, 0.4, 10, 3000, (SHARED, Peak(6.2, 2.5))),
    Cost(0, 20, 10, 0.4, 10, 4000, (SHARED, Peak(10.7, 2.5))),
    iterative=True,
)
SPLITTING_AND_REFIT = Costs(
    Cost(20, 35, 9, 1, 20, 9000, (SHARED, Peak(7.4, 8.0))),
    Cost(28, 37, 17, 1, 20, 13000, (SHARED, Peak(11.0, 8.0))),
    iterative=True,
)
COSTS: Mapping[str, Costs] = MappingProxyType(
    {
        "magnitude": SCORES,
        "wanda": SCORES,
        "ria": SCORES,
        "sparsegpt": SWEEP,
        "least-squares": REFIT,
        "fista": SEARCH,
        "fista-paper": SEARCH_AS_PUBLISHED,
        "admm": SPLITTING,
        "alps": SPLITTING_AND_REFIT,
    }
)


def cost_of(solver: Any, *, pair: bool) -> Cost | None:
    """Cost of a method or a chain for one matrix; None where it has no figures.

    Parameters
    ----------
    solver
        Configured.
    pair
        Whether the dense and the pruned model give the matrix different inputs.
    """
    total = Cost()
    for step in steps_of(solver):
        costs = COSTS.get(solver_name(step))
        options = set(options_of(step)) - {"memory_budget"}
        if costs is None or (costs.iterative and options):
            return None
        total = total.then(costs.pair if pair else costs.alone)
    return total


def workspace_of(solver: Any, *, pair: bool) -> Workspace | None:
    """Memory of a method while it solves one matrix; None where it has no figures."""
    cost = cost_of(solver, pair=pair)
    if cost is None:
        return None
    budgets = [step.memory_budget for step in steps_of(solver) if has_budget(step)]
    return Workspace(cost.peaks, max(budgets, default=Workspace.budget))


def has_budget(solver: Any) -> bool:
    """Whether a method takes a memory budget."""
    return hasattr(solver, "memory_budget")

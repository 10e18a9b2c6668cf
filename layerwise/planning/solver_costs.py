"""What the methods cost for one matrix: operations, bytes, and memory.

The figures were counted, by :class:`layerwise.timing.operations.OperationCount` and
:class:`layerwise.planning.dry.LiveBytes`, on random layers of several shapes,
everything included: posing the problem, solving it, grading the answer. Methods that
iterate until they are done stand with what they took there; real layers take up to twice
as much or as little. A method that is not in the table has no figures, and none are made
up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from layerwise.configure import options_of
from layerwise.planning.shapes import StageShape
from layerwise.planning.workspace import Peak, Workspace
from layerwise.solve import solver_name, steps_of
from layerwise.timing.floor import Work


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
        Memory, see :class:`~layerwise.planning.workspace.Workspace`.
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


DRIFT = Peak(3.0, 1.0)  # what a pair of streams differs by, before the problem is posed
SCORES = Costs(
    Cost(0, 0, 3, 0, 0, 480, (Peak(0.7, 0.0, 3.9),)),
    Cost(0, 0, 4, 0, 0, 650, (DRIFT, Peak(1.7, 0.0, 3.9))),
)
"""Posing a problem, choosing a mask from scores, and grading the answer."""
# half a gram of the sweep is inside the factorization, which no tensor shows
SWEEP = Costs(
    Cost(0, 0.65, 4, 0.34, 0, 850, (Peak(3.3, 1.5),)),
    Cost(0, 1.65, 5, 0.34, 0, 1100, (DRIFT, Peak(4.5, 1.5))),
)
REFIT = Costs(
    Cost(17, 2.4, 6.9, 0.33, 1.2, 4800, (Peak(1.2, 2.4, 11.0),)),
    Cost(17, 2.4, 8.4, 0.33, 1.2, 5100, (Peak(2.2, 2.4, 11.0), Peak(2.2, 0.1, 13.2))),
    iterative=True,
)
"""By conjugate gradients, as a step behind another method."""
SEARCH = Costs(
    Cost(17, 140, 23.8, 1.4, 1.6, 24000, (Peak(11.4, 2.0), Peak(5.3, 6.2, 6.4))),
    Cost(17, 140, 26.3, 1.4, 1.6, 26000, (DRIFT, Peak(13.7, 3.7), Peak(6.3, 6.2, 6.4))),
    iterative=True,
)
SEARCH_AS_PUBLISHED = Costs(
    Cost(0, 130, 12, 0.34, 0, 20000, (Peak(10.9, 1.5),)),
    Cost(0, 130, 14, 0.34, 0, 22000, (Peak(12.9, 1.5),)),
    iterative=True,
)
SPLITTING = Costs(
    Cost(0, 20, 4, 0.34, 2, 2700, (Peak(3.2, 2.5, 5.0),)),
    Cost(0, 20, 5, 0.34, 2, 3200, (DRIFT, Peak(4.7, 2.5, 5.0))),
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
    budgets = [getattr(step, "memory_budget", 0) for step in steps_of(solver)]
    return Workspace(cost.peaks, max(budgets) or Workspace.budget)

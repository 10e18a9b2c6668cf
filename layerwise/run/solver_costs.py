"""What the methods cost for one matrix: operations, bytes, and memory.

The figures were counted, by :class:`layerwise.run.operations.OperationCount` and
:class:`layerwise.run.dry.LiveBytes`, on random layers of several shapes, everything
included: posing the problem, solving it, grading the answer. Methods that iterate until
they are done stand with what they took there; real layers take up to twice as much or as
little. A method that is not in the table has no figures, and none are made up.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from layerwise.run.floor import Work
from layerwise.run.memory_model import StageShape, Workspace
from layerwise.run.recipe import options_of
from layerwise.solve import solver_name, steps_of


@dataclass(frozen=True)
class Cost:
    """Of one matrix (out, in), in units that follow its shape.

    Parameters
    ----------
    single, double
        Products of the matrix with the gram, 2 out in^2 operations each, in float32 and
        in float64.
    cubic, cubic_double
        Factorizations and inverses of the gram in units of in^3 operations; matrices that
        share their inputs share them.
    traffic
        Bytes that are read and written, per entry of the matrix.
    matrices, grams
        Memory, see :class:`~layerwise.run.memory_model.Workspace`.
    row_systems
        Whether row systems fill what the memory budget allows.
    """

    single: float = 0.0
    double: float = 0.0
    cubic: float = 0.0
    cubic_double: float = 0.0
    traffic: float = 0.0
    matrices: float = 0.0
    grams: float = 0.0
    row_systems: bool = False

    def then(self, other: "Cost") -> "Cost":
        """Both, one after the other: work adds up, memory is that of the larger."""
        return Cost(
            self.single + other.single,
            self.double + other.double,
            max(self.cubic, other.cubic),
            max(self.cubic_double, other.cubic_double),
            self.traffic + other.traffic,
            max(self.matrices, other.matrices),
            max(self.grams, other.grams),
            self.row_systems or other.row_systems,
        )

    def work(self, stage: StageShape) -> Work:
        """Operations and bytes for all matrices of a stage."""
        products = 2.0 * stage.weights * stage.width
        cubes = float(stage.width) ** 3
        return Work(
            {
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


GRADED = Costs(
    Cost(double=4, traffic=1100, matrices=4.6),
    Cost(double=9, traffic=1900, matrices=8.7),
)
"""Posing a problem and grading its answer, which every method pays."""

COSTS: Mapping[str, Costs] = MappingProxyType(
    {
        "magnitude": GRADED,
        "wanda": GRADED,
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
    rows = max(budgets) if cost.row_systems else 0
    return Workspace(cost.matrices, cost.grams, rows)

"""Costs of the methods for one matrix: operations, bytes, and memory.

The figures were counted, by :class:`layerwise.timing.operations.OperationCount` and
:class:`layerwise.planning.dry.LiveBytes`, on random layers of several shapes. A matrix
costs the posing of its problem and the grading of its answer, once, and its method, or
every step of a chain. Iterative methods have the figures that were counted there; real
layers take between half and twice as much. A method that is not in the table has no
figures, and none are guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from layerwise.configure import options_of
from layerwise.planning.shapes import StageShape
from layerwise.planning.workspace import Peak, Workspace
from layerwise.solve import steps_of
from layerwise.solver import Solver
from layerwise.timing.floor import Work


@dataclass(frozen=True)
class Cost:
    """Cost of one matrix (out, in), in units that follow from its shape.

    Parameters
    ----------
    half, single, double
        Products of the matrix with the gram, 2 out in^2 operations each, in bfloat16,
        float32 and float64.
    cubic, cubic_double
        Factorizations, inverses and eigenvalues of the gram in units of in^3 operations,
        in float32 and float64; matrices that share their inputs share these operations.
    traffic
        Bytes read and written, per entry of the matrix.
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
        """Cost of both, one after the other: work adds up, memory is the larger one."""
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
    """Costs for inputs that both models share, and for a pair of streams.

    Parameters
    ----------
    alone, pair
        Cost with one stream of inputs, and with a dense and a pruned one.
    iterative
        Whether options of the method change its cost, so that it is only known for the
        defaults.
    keeps_weights
        Whether kept weights stay dense ones, which have the type of the model already.
    """

    alone: Cost
    pair: Cost
    iterative: bool = False
    keeps_weights: bool = False

    def of(self, *, pair: bool) -> Cost:
        """Cost for one kind of inputs."""
        return self.pair if pair else self.alone


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
        costs = COSTS.get(step.name)
        options = set(options_of(step)) - {"memory_budget"}
        if costs is None or (costs.iterative and options):
            return None
        total, keeps_weights = total.then(costs.of(pair=pair)), costs.keeps_weights
    return total if keeps_weights else total.then(STORED.of(pair=pair))


def workspace_of(solver: Solver, *, pair: bool) -> Workspace | None:
    """Memory of a method while it solves one matrix; None if it has no figures."""
    cost = cost_of(solver, pair=pair)
    if cost is None:
        return None
    budgets = [getattr(step, "memory_budget", 0) for step in steps_of(solver)]
    return Workspace(cost.peaks, max(budgets) or Workspace.budget)

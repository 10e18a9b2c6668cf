"""Cost of a method for one matrix, in units that follow from the shape of the matrix."""

from dataclasses import dataclass

import torch

from layerwise.planning.shapes import StageShape
from layerwise.planning.workspace import Peak
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
    rows, rows_double
        Work on a system of the size of the gram for every row, in units of out in^3
        operations, in float32 and float64.
    """

    half: float = 0.0
    single: float = 0.0
    double: float = 0.0
    cubic: float = 0.0
    cubic_double: float = 0.0
    traffic: float = 0.0
    peaks: tuple[Peak, ...] = ()
    rows: float = 0.0
    rows_double: float = 0.0

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
            self.rows + other.rows,
            self.rows_double + other.rows_double,
        )

    def work(self, stage: StageShape) -> Work:
        """Operations and bytes for all matrices of a stage."""
        products = 2.0 * stage.weights * stage.width
        cubes, systems = float(stage.width) ** 3, stage.weights * float(stage.width) ** 2
        return Work(
            {
                torch.bfloat16: self.half * products,
                torch.float32: self.single * products
                + self.cubic * cubes
                + self.rows * systems,
                torch.float64: self.double * products
                + self.cubic_double * cubes
                + self.rows_double * systems,
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

"""Counts the cost of methods on small random layers, and prints it as figures.

``python -m layerwise.planning.count_costs`` prints :mod:`.counted_costs` anew; with names,
the entries of those methods only, as in
``python -m layerwise.planning.count_costs best "best effort=fast"``.

Operations, bytes and memory are counted on layers of a few shapes, and written as sums of
terms that grow with the shape in known ways. The terms are those, none negative, that fit
best relative to the counts. Iterative methods take more or fewer steps on other layers.
"""

import sys
from collections.abc import Callable, Sequence
from functools import cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from layerwise.configure import configure
from layerwise.errors import LayerwiseError
from layerwise.evaluate import relative_error
from layerwise.moments import Moments
from layerwise.patterns import Unstructured
from layerwise.planning.costs import Cost, Costs
from layerwise.planning.dry import LiveBytes
from layerwise.planning.workspace import Peak
from layerwise.problem import LayerProblem
from layerwise.run.steps import status
from layerwise.solve import chain, solve
from layerwise.solver import Solver, requirements
from layerwise.timing.floor import Work, grading_work
from layerwise.timing.operations import OperationCount
from layerwise.timing.random_layers import random_gram, random_weight

SHAPES = ((1024, 96), (576, 192), (1152, 192), (192, 384))
SMALL = ((256, 32), (128, 64), (256, 64), (64, 96))  # for a count during a plan
CHUNK = 512  # rows, as least squares takes them on a CPU
START = "magnitude"  # of methods that need a mask
SCORED = ("magnitude", "wanda", "ria", "gblm")  # their kept weights are dense ones
DIRECT = (*SCORED, "sparsegpt", "multi-weight")  # options do not change their cost much
DTYPES = (torch.bfloat16, torch.float32, torch.float64)
NAMES = (  # what the table holds
    *("gblm", "dsnot", "frank-wolfe", "alps", "obs", "swaps", "sparse-swaps"),
    *("multi-weight", "multi-weight-ss", "multi-weight-sm"),
    *("multi-weight-ms", "multi-weight-mm"),
    *("best", "best effort=fast", "best effort=thorough"),
)

Shapes = Sequence[tuple[int, int]]
Terms = Callable[[int, int], tuple[float, ...]]


def costs_of(solver: Solver, shapes: Shapes = SHAPES) -> Costs | None:
    """Costs of one step as counted here; None if it cannot solve such layers."""
    status(f"counting the cost of {solver.name} on small layers")
    try:
        alone, pair = (_cost(solver, shapes, pair=pair) for pair in (False, True))
    except (LayerwiseError, ArithmeticError, RuntimeError, TypeError, ValueError):
        return None  # also a user's own method that fails on them
    return Costs(alone, pair, solver.name not in DIRECT, solver.name in SCORED)


def _cost(solver: Solver, shapes: Shapes, *, pair: bool) -> Cost:
    """Fitted cost of a method beyond posing, grading and storing."""
    counted = chain(START, solver) if "mask" in requirements(solver) else solver
    works, lives = [], []
    for shape in shapes:
        found, live = _count(counted, shape, pair=pair)
        base = _base(shape, pair=pair)
        if solver.name not in SCORED:
            base += grading_work([shape])
        works.append(_difference(found, base))
        lives.append(live)

    def fit(dtype: torch.dtype) -> tuple[float, ...]:
        counts = [work.flops.get(dtype, 0.0) for work in works]
        return _fit(shapes, counts, _products)

    half, single, double = map(fit, DTYPES)
    moved = [work.bytes for work in works]
    (traffic,) = _fit(shapes, moved, lambda rows, width: (rows * width,))
    return Cost(
        half=half[0],
        single=single[0],
        double=double[0],
        cubic=single[1],
        cubic_double=double[1],
        traffic=traffic,
        peaks=(Peak(*_fit(shapes, lives, _arrays)),),
        rows=single[2],
        rows_double=double[2],
    )


@cache
def _base(shape: tuple[int, int], *, pair: bool) -> Work:
    """Work of posing and grading a layer, with the cheapest method."""
    return _count(chain(START), shape, pair=pair)[0]


def _products(rows: int, width: int) -> tuple[float, ...]:
    """Products with the gram, work on the gram, and work on a system of every row."""
    return 2.0 * rows * width**2, 1.0 * width**3, 1.0 * rows * width**3


def _arrays(rows: int, width: int) -> tuple[float, ...]:
    """Bytes of one array of every kind of a peak."""
    entries = rows, width, min(rows, CHUNK), rows * width
    return tuple(8.0 * width * count for count in entries)


def _fit(shapes: Shapes, counts: Sequence[float], terms: Terms) -> tuple[float, ...]:
    """Least squares of relative errors with coefficients of at least zero."""
    table = np.array([terms(*shape) for shape in shapes])
    counted = np.array(counts, dtype=float)
    size = table.shape[1]
    best, found = float("inf"), [0.0] * size
    if not counted.any():
        return tuple(found)
    scale = np.maximum(counted, counted.max() * 1e-3)
    for number in range(1, size + 1):
        for chosen in combinations(range(size), number):
            columns = table[:, chosen] / scale[:, None]
            values, *_ = np.linalg.lstsq(columns, counted / scale, rcond=None)
            error = float(np.square(columns @ values - counted / scale).sum())
            if (values >= 0).all() and error < best * 0.999:
                best, found = error, [0.0] * size
                for at, value in zip(chosen, values.tolist(), strict=True):
                    found[at] = float(f"{value:.3g}")
    return tuple(found)


def _count(solver: Solver, shape: tuple[int, int], *, pair: bool) -> tuple[Work, int]:
    """Work and peak memory of posing, solving and grading a layer as a run does it."""
    weight, moments, drift, gradient = _layer(*shape, pair=pair)
    with LiveBytes() as live, OperationCount() as count:
        problem = LayerProblem.from_moments(
            weight, moments, pattern=Unstructured(0.5), drift=drift, gradient_norm=gradient
        )
        found = solve(problem, solver)
        stored = found.weight.to(weight.dtype)
        if not torch.equal(stored.to(found.weight.dtype), found.weight):
            relative_error(problem, stored)
    return count.work, live.peak


def _layer(
    rows: int, width: int, *, pair: bool
) -> tuple[Tensor, Moments, Tensor | None, Tensor]:
    """Weight, moments as a run sums them up, drift, and gradient norms."""
    device = torch.device("cpu")
    gram = random_gram(width, device, 1)
    mean = 0.3 * gram.diagonal().sqrt()
    gram = gram + torch.outer(mean, mean)
    weight = random_weight(rows, width, device, 0).bfloat16()
    gradient = weight.float().abs()
    if not pair:
        return weight, Moments(gram, None, mean, n_tokens=4096, summed=True), None, gradient
    cross, drift = gram * 1.001, torch.full((rows,), 1e-2, dtype=torch.float64)
    moments = Moments(gram, cross, mean, mean, n_tokens=4096, summed=True)
    return weight, moments, drift, gradient


def _difference(found: Work, base: Work) -> Work:
    flops = {t: max(0.0, n - base.flops.get(t, 0.0)) for t, n in found.flops.items()}
    return Work(flops, max(0.0, found.bytes - base.bytes))


def configured(name: str) -> Solver:
    """Solver of an entry of the table: a name, and options behind it."""
    method, *options = name.split()
    return configure(method, dict(option.split("=") for option in options))


def entry(name: str) -> str:
    """Line of the table."""
    costs = costs_of(configured(name))
    assert costs is not None, name
    return f'    "{name}": {costs!r},'


HEAD = '''"""Costs of methods as counted by ``python -m layerwise.planning.count_costs``."""

from collections.abc import Mapping
from types import MappingProxyType

from layerwise.planning.costs import Cost, Costs
from layerwise.planning.workspace import Peak

COUNTED: Mapping[str, Costs] = MappingProxyType(
    {
'''


def main(names: Sequence[str]) -> None:
    """Print the entries of some methods, or the module with all of them."""
    sys.stdout.write("" if names else HEAD)
    for name in names or NAMES:
        sys.stdout.write(entry(name) + "\n")
        sys.stdout.flush()
    sys.stdout.write("" if names else "    }\n)\n")


if __name__ == "__main__":
    main(sys.argv[1:])

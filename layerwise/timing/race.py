"""Compare solvers on the same layers: seconds, error, certificate, use of the machine.

Every method solves every layer twice, from cold caches. The first run counts the operations
(:mod:`layerwise.timing.operations`) and warms up the machine; the second is timed. The
share of a rate is the time of the counted work at the measured rate
(:class:`layerwise.timing.floor.Machine`), divided by the time it took.
"""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import UsageError
from layerwise.grams.layer_files import StoredLayer, missing_statistic, read_layers
from layerwise.lower_bounds import gap_above, least_objective
from layerwise.modes import in_ordinary_mode
from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.pipeline.zeros import choose_pattern
from layerwise.run.settings import choose_device
from layerwise.solution import Certificate, Solution
from layerwise.solve import refuse_unless_solvable, resolve, solve
from layerwise.timing.floor import Machine, Work
from layerwise.timing.operations import OperationCount
from layerwise.timing.random_layers import layers_of_shape, layers_of_sizes


@dataclass(frozen=True)
class Lap:
    """One method on one layer.

    Parameters
    ----------
    layer, rows, width
        Name and shape of the layer.
    method
        Name of the method.
    seconds
        Wall time, factorizations and grading included.
    iterations
        Iterations of the main loop, 0 for direct methods.
    relative_error, status
        See :class:`~layerwise.Solution`.
    certificate
        ``kind`` and ``bound`` of the solver's own certificate, or None.
    gap
        Largest share of the damped objective that any other answer could save, or None
        if no bound was requested.
    flops
        Counted operations by data type.
    bytes
        Counted bytes.
    matmul_share, bandwidth_share
        Shares of the measured rates.
    curve
        Seconds and relative error at the iterations that the solver reports, then of the
        graded answer.
    """

    layer: str
    rows: int
    width: int
    method: str
    seconds: float
    iterations: int
    relative_error: float
    status: str
    certificate: Mapping[str, Any] | None
    gap: float | None
    flops: Mapping[str, float]
    bytes: float
    matmul_share: float
    bandwidth_share: float
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Race:
    """Laps of a race, with its settings and the rates of the machine.

    Parameters
    ----------
    title
        Layers, sparsity and damping.
    device, threads
        Device, and number of CPU threads.
    gemm_rates
        Measured operations per second by data type.
    copy_rate
        Measured bytes per second.
    laps
        Laps in the order of the layers, then of the methods.
    """

    title: str
    device: str
    threads: int
    gemm_rates: Mapping[str, float]
    copy_rate: float
    laps: tuple[Lap, ...]

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        atomic_write(path, (json.dumps(asdict(self), indent=1) + "\n").encode())


@in_ordinary_mode
def race(
    methods: str | Iterable[Any],
    *,
    layers: str | None = None,
    shape: str | None = None,
    grams: Path | None = None,
    sparsity: str = "0.5",
    damping: float = 0.01,
    gap: bool = False,
    device: str | torch.device = "auto",
    seed: int = 0,
) -> Race:
    """Race methods on random layers or stored ones.

    Parameters
    ----------
    methods
        Solvers, chains or their names; or names with commas between them.
    layers, shape, grams
        Sizes such as ``2048x2048,1024x4096``, a name of
        :data:`layerwise.timing.shapes.SHAPES`, or a file or folder as in
        :mod:`layerwise.grams.layer_files`: one of the three.
    sparsity
        Fraction of zeros of every row, or ``n:m``.
    damping
        Damping relative to the mean diagonal of the gram.
    gap
        Whether to prove a lower bound per layer, which costs more than most solvers.
    device
        Where to compute.
    seed
        Seed of random layers.
    """
    given = [value for value in (layers, shape, grams) if value is not None]
    if len(given) != 1:
        message = "a race needs layers, a shape or grams: give exactly one of the three"
        raise UsageError(message)
    names = methods.split(",") if isinstance(methods, str) else methods
    racers = [resolve(one.strip() if isinstance(one, str) else one) for one in names]
    pattern = choose_pattern(sparsity, None)
    torch_device = choose_device(device)
    if layers is not None:
        entries = layers_of_sizes(layers, torch_device, seed)
    elif shape is not None:
        entries = layers_of_shape(shape, torch_device, seed)
    else:
        assert grams is not None
        entries = read_layers(grams)
    machine = Machine(torch_device)
    laps = []
    for entry in entries:
        laps += _race_on(entry.on(torch_device), racers, pattern, damping, machine, gap)
    return Race(
        f"{given[0]}: {sparsity}, damping {damping:g}",
        str(torch_device),
        torch.get_num_threads(),
        {_name(dtype): rate for dtype, rate in machine.gemm_rates.items()},
        machine.copy_rate,
        tuple(laps),
    )


def _race_on(
    layer: StoredLayer,
    racers: list[Any],
    pattern: Pattern,
    damping: float,
    machine: Machine,
    gap: bool,
) -> list[Lap]:
    problem = layer.problem(pattern, damping)
    for racer in racers:  # before any of them starts
        _refuse_unless_solvable(racer, problem)
    runs = [_run(racer, problem) for racer in racers]
    gaps: list[float | None] = [None] * len(runs)
    if gap:
        best = min(runs, key=lambda run: run[0].objective)[0]
        bound = least_objective(problem, best.weight)
        gaps = [gap_above(problem, run[0].weight, bound) for run in runs]
    laps = []
    for racer, proven, (solution, seconds, curve, work) in zip(
        racers, gaps, runs, strict=True
    ):
        matmuls = Work(work.flops)
        traffic = Work(bytes=work.bytes)
        proof = solution.certificate
        laps.append(
            Lap(
                layer=layer.name,
                rows=problem.shape[0],
                width=problem.shape[1],
                method=racer.name,
                seconds=seconds,
                iterations=solution.iterations,
                relative_error=solution.relative_error,
                status=solution.status.value,
                certificate=None if proof is None else _as_json(proof),
                gap=proven,
                flops={_name(dtype): count for dtype, count in work.flops.items()},
                bytes=work.bytes,
                matmul_share=machine.floor(matmuls) / seconds,
                bandwidth_share=machine.floor(traffic) / seconds,
                curve=curve,
            )
        )
    return laps


def _run(
    racer: Any, problem: LayerProblem
) -> tuple[Solution, float, tuple[tuple[float, float], ...], Work]:
    """Solution, seconds, error against time, and counted work."""
    posed = _cold(problem)
    with OperationCount() as count:
        solve(posed, racer)
    energy = float(problem.energy.sum())
    points: list[tuple[float, float]] = []
    posed = _cold(problem)
    _synchronize(problem)
    start = time.perf_counter()

    def note(entry: Mapping[str, float]) -> None:
        if "objective" in entry and energy > 0:
            _synchronize(problem)
            error = (max(entry["objective"], 0.0) / energy) ** 0.5
            points.append((time.perf_counter() - start, error))

    solution = solve(posed, racer, on_iteration=note)
    _synchronize(problem)
    seconds = time.perf_counter() - start
    points.append((seconds, solution.relative_error))
    return solution, seconds, tuple(points), count.work


def _cold(problem: LayerProblem) -> LayerProblem:
    """Return a copy of the problem without its cached results."""
    return replace(problem, moments=replace(problem.moments))


def _refuse_unless_solvable(racer: Any, problem: LayerProblem) -> None:
    refuse_unless_solvable(racer, problem)
    if missing := missing_statistic(racer, problem.moments):
        message = (
            f"{missing}, which a race on grams does not have: time it with layerwise bench "
            f"MODEL"
        )
        raise UsageError(message)


def _as_json(proof: Certificate) -> dict[str, Any]:
    return {"kind": proof.kind, "bound": proof.bound}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _synchronize(problem: LayerProblem) -> None:
    if problem.weight.is_cuda:
        torch.cuda.synchronize(problem.weight.device)

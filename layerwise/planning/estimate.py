"""Least and expected seconds of the stages of a run on this machine.

The floor is the counted work divided by quickly measured rates (:mod:`.floor`). The
expected time is the work of this implementation, divided by the share of those rates that
it reached in measured runs. A stage without such figures stays unknown.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from layerwise.adapters import Adapter
from layerwise.gram import precision_of
from layerwise.moments import EXACT_RANK_WIDTH
from layerwise.planning.shapes import ModelShape, RunShape
from layerwise.planning.solver_costs import cost_of
from layerwise.run.activations.dense_side import fits
from layerwise.run.activations.hidden_store import n_streams
from layerwise.solver import Solver
from layerwise.timing.floor import (
    Machine,
    Work,
    block_config,
    forward_work,
    gram_work,
    run_work,
)

GEMM_SIZE = {"cpu": 768, "cuda": 4096}
COPY_BYTES = {"cpu": 1 << 26, "cuda": 1 << 30}
LEAST_SECONDS = 0.05  # of the measurement of a rate
HASHED = 1 << 24  # bytes hashed to measure the rate
SHARES: Mapping[str, float] = MappingProxyType(
    {"load": 0.05, "forward": 0.2, "gram": 0.4, "solve": 0.4, "write": 0.06}
)
"""Rough share of the measured rates that the stages of runs on a CPU reached."""
RANK_WORK = 4.0  # operations of an eigenvalue decomposition, in units of in^3


@dataclass(frozen=True)
class StageEstimate:
    """One stage of a planned run.

    Parameters
    ----------
    stage
        Name of the stage.
    work
        Work that no run can avoid.
    floor
        Seconds for that work at the rates of this machine.
    seconds
        Expected seconds; None if unknown.
    """

    stage: str
    work: Work
    floor: float
    seconds: float | None


def quick_machine(device: torch.device) -> Machine:
    """Machine whose rates are measured within some tenths of a second."""
    size, size_of_copy = GEMM_SIZE.get(device.type), COPY_BYTES.get(device.type)
    return Machine(device, size, size_of_copy, LEAST_SECONDS)


def hash_rate() -> float:
    """Bytes per second at which a run hashes its source."""
    data = bytes(HASHED)
    start = time.perf_counter()
    hashlib.sha256(data).digest()
    return HASHED / (time.perf_counter() - start)


def estimates(
    model: Any,
    adapter: Adapter,
    solver: Solver,
    shapes: Mapping[str, tuple[int, int]],
    sizes: ModelShape,
    run: RunShape,
    stored: int,
    machine: Machine,
    *,
    certify: bool = False,
) -> list[StageEstimate]:
    """Stages of a run, in order.

    Parameters
    ----------
    model, adapter
        The model, on any device, and its declaration.
    solver
        The method.
    shapes
        Shapes of the pruned matrices, by full name.
    sizes, run
        Shapes of the model and of the run, as for the memory model.
    stored
        Bytes of the checkpoint.
    machine
        The machine whose rates are used.
    certify
        Whether gaps are proven; the cost of the proofs is unknown.
    """
    device = machine.device
    floors = run_work(
        model, adapter, shapes, run.error_correction, run.tokens, run.length, device
    )
    files = Work(bytes=float(stored))
    expected = {
        "load": files,
        "forward": forward_passes(model, adapter, shapes, sizes, run),
        "gram": floors["gram"] + _drift(sizes, run, precision_of(model.dtype, device)),
        "solve": _solving(solver, sizes, run),
        "write": Work(bytes=2.0 * stored),
    }
    stages = []
    for name in ("load", "hash", "forward", "gram", "solve", "certify", "write"):
        work = floors.get(name, files if name in ("load", "hash", "write") else Work())
        seconds: float | None = None
        if name == "hash":
            seconds = stored / hash_rate()
        elif (known := expected.get(name)) is not None:
            seconds = _both(machine, known) / SHARES[name]
        if name == "certify" and not certify:
            continue
        stages.append(StageEstimate(name, work, machine.floor(work), seconds))
    return stages


def _both(machine: Machine, work: Work) -> float:
    """Seconds at full rate if products and memory traffic do not overlap."""
    traffic = Work(bytes=work.bytes)
    return machine.floor(Work(work.flops)) + machine.floor(traffic)


def forward_passes(
    model: Any,
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, int]],
    sizes: ModelShape,
    run: RunShape,
) -> Work:
    """Products of all passes of a run, each up to the point where it is stopped."""
    total = Work()
    blocks = adapter.blocks_of(model)
    for number, (name, block) in enumerate(blocks.items()):
        config = block_config(model, number)
        order = [
            index
            for index, stage in enumerate(adapter.stages_of(name))
            if any(f"{name}.{linear}" in shapes for linear in stage.linears)
        ]

        def until(
            index: int, name: str = name, block: Any = block, config: Any = config
        ) -> Work:
            """Work before a stage."""
            later = adapter.stages_of(name)[index:]
            skipped = [adapter.linear(block, n) for stage in later for n in stage.linears]
            return forward_work(block, config, run.tokens, run.length, skipped)

        advanced = number < len(blocks) - 1
        if advanced:
            whole = forward_work(block, config, run.tokens, run.length)
            total += sum([whole] * n_streams(run.error_correction), Work())
        if not order:
            continue
        if not run.staged:
            total += until(order[-1])
            continue
        same = run.error_correction == "block" or number == 0
        pruned = list(enumerate(order))[1 if same else 0 :]
        widths = sizes.blocks[number].widths
        if not fits(widths, run.tokens, sizes.itemsize, run.store):
            passes = order + [index for _, index in pruned]
            total += sum((until(index) for index in passes), Work())
            continue
        if not (advanced and run.workers == 1):  # otherwise that pass keeps the inputs
            total += until(order[-1])
        settled: Work | None = None  # before the part of the pruned block that can change
        for position, index in pruned:
            total += until(index) if settled is None else _rest(until(index), settled)
            if sizes.blocks[number].stages[position].passes_through:
                settled = until(index + 1)
                total += _rest(settled, until(index))  # the output of the module
    return total


def _rest(work: Work, known: Work) -> Work:
    """Products of a pass without those that are already known from another one."""
    return Work(
        {dtype: count - known.flops.get(dtype, 0.0) for dtype, count in work.flops.items()}
    )


def _drift(sizes: ModelShape, run: RunShape, dtype: torch.dtype) -> Work:
    """Grams of the difference between two streams."""
    if not run.staged:
        return Work()
    widths = [
        stage.width
        for number, block in enumerate(sizes.blocks)
        for index, stage in enumerate(block.stages)
        if index or (run.error_correction == "full" and number)
    ]
    return gram_work(widths, [False] * len(widths), run.tokens, dtype)


def _solving(solver: Solver, sizes: ModelShape, run: RunShape) -> Work | None:
    """Work of the method on all matrices; None if its figures are unknown."""
    total = Work()
    for number, block in enumerate(sizes.blocks):
        for index, stage in enumerate(block.stages):
            first = index == 0 and (run.error_correction == "block" or number == 0)
            cost = cost_of(solver, pair=run.staged and not first)
            if cost is None:
                return None
            total += cost.work(stage)
            if stage.width <= EXACT_RANK_WIDTH:
                total += Work({torch.float64: RANK_WORK * float(stage.width) ** 3})
    return total


def total_seconds(stages: Sequence[StageEstimate]) -> tuple[float, bool]:
    """Sum of the known seconds, and whether some stage is unknown."""
    known = [stage.seconds for stage in stages if stage.seconds is not None]
    return sum(known), len(known) < len(stages)

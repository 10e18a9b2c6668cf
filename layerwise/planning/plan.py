"""What a run would do and what it would take, before it touches a weight.

Everything follows from ``config.json``, the headers of the safetensors files and a few
quick measurements of this machine. The calibration text is not read: its size is known
from the arguments.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layerwise.adapters import Adapter
from layerwise.errors import (
    InvalidProblemError,
    LayerwiseError,
    UnsupportedModelError,
    UsageError,
)
from layerwise.patterns import Pattern
from layerwise.planning.advice import refusals
from layerwise.planning.dry import adapter_without_memory
from layerwise.planning.estimate import estimates, quick_machine
from layerwise.planning.inventory import by_shape, inventory
from layerwise.planning.memory_model import (
    hidden_states_bytes,
    memory_of,
    stream_bytes,
)
from layerwise.planning.model_shape import model_shape
from layerwise.planning.plan_result import Plan
from layerwise.planning.shapes import ModelShape, RunShape
from layerwise.planning.solver_costs import workspace_of
from layerwise.run.activations.dense_side import room
from layerwise.run.activations.hidden_store import check_activations, goes_to_disk
from layerwise.run.capacity import Capacity, capacity_of, own_memory
from layerwise.run.channels.structure import StructureOptions, choose_structure
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.headers import Headers
from layerwise.run.models.residency import can_stream
from layerwise.run.pipeline.gradients import required_gradient
from layerwise.run.pipeline.parallel import Workers
from layerwise.run.pipeline.targets import Selection
from layerwise.run.settings import (
    as_entries,
    check_error_correction,
    choose_certify,
    choose_device,
    choose_pattern,
    choose_sequence_length,
    choose_solver,
    with_published_start,
)
from layerwise.run.workers.schedule import Rules
from layerwise.solve import resolve, solver_name


def plan_run(
    model: str | Path,
    method: Any = "fista",
    sparsity: float | str | None = None,
    pattern: Pattern | str | None = None,
    *,
    n_sequences: int = 128,
    sequence_length: int | None = None,
    error_correction: str = "block",
    targets: str | Sequence[str] = "Linear",
    ignore: str | Sequence[str] = ("lm_head",),
    damping: float = 0.01,
    certify: bool | None = None,
    options: Mapping[str, Any] | None = None,
    activations: str = "auto",
    workers: int = 1,
    device: str | torch.device = "auto",
    memory_budget: int | None = None,
    output_dir: str | Path | None = None,
) -> Plan:
    """Say what :func:`layerwise.prune_model` would do with these arguments.

    No weight is read. The plan names every matrix with its fate and the reason, exact
    counts of zeros, the peaks of the memory, the space on the disk, and the time.

    Parameters
    ----------
    model
        A checkpoint folder or hub name.
    method, sparsity, pattern, error_correction, targets, ignore, damping, certify, options
        As for :func:`layerwise.prune_model`.
    n_sequences, sequence_length
        Size of the calibration set.
    activations
        Where hidden states are kept: ``"memory"``, ``"disk"`` or ``"auto"``.
    workers
        Processes that prune blocks at the same time.
    device
        Where blocks are computed.
    memory_budget
        Bytes for the row systems of refits.
    output_dir
        Where the result would go: the free space there is checked.

    Returns
    -------
    Plan
        With the reason in `refusal` if such a run would not start or not end.

    Raises
    ------
    UsageError, InvalidProblemError, UnsupportedModelError, DataError
        If an argument is impossible, an entry matches nothing, or the checkpoint is
        damaged or does not belong to its configuration: what `prune_model` would raise.
    """
    chosen = _pattern_of(method, sparsity, pattern)
    solver = choose_solver(method, chosen, damping, options or {}, memory_budget)
    certified = choose_certify(certify, solver, chosen)
    check_error_correction(error_correction)
    _check_counts(n_sequences=n_sequences)
    check_activations(activations)
    place = choose_device(device)
    source = Checkpoint.open(model)
    headers = Headers.read(source)
    streamed = headers.one_to_one and can_stream(chosen, solver)
    Workers(workers).check(error_correction, streamable=streamed)
    skeleton = headers.model
    length = choose_sequence_length(skeleton, sequence_length)
    _check_counts(sequence_length=length)
    base = own_memory()
    adapter = adapter_without_memory(skeleton)
    solver = with_published_start(solver, skeleton, chosen)
    entries = as_entries(targets), as_entries(ignore)
    refusal = _selection_error(skeleton, adapter, entries, chosen)
    groups = inventory(skeleton, adapter, *entries, chosen)
    shapes = by_shape(groups)
    sizes = model_shape(skeleton, adapter, shapes, length)
    output = None if output_dir is None else Path(output_dir)
    capacity = capacity_of(place, output)
    run = RunShape(
        n_sequences=n_sequences,
        length=length,
        error_correction=error_correction,
        base=base,
        accelerator=place.type != "cpu",
        workspace=workspace_of(solver, pair=error_correction in ("block", "full")),
        workers=workers,
        streamed=streamed,
        store=room(place),
    )
    run = _with_store(sizes, run, activations, capacity)
    disk = disk_of(source, sizes, run)
    machine = quick_machine(place)
    stored = sum(entry.n_bytes for entry in source.entries().values())
    stages = estimates(
        skeleton,
        adapter,
        solver,
        shapes,
        sizes,
        run,
        stored,
        machine,
        certify=certified,
    )
    return Plan(
        model=str(model),
        method=solver_name(solver),
        pattern=str(chosen),
        error_correction=error_correction,
        device=str(place),
        n_sequences=n_sequences,
        length=length,
        groups=tuple(groups),
        streamed=streamed,
        on_disk=run.on_disk,
        sizes=sizes,
        memory=memory_of(sizes, run),
        disk=disk,
        capacity=capacity,
        stages=tuple(stages),
        gemm_rates=dict(machine.gemm_rates),
        copy_rate=machine.copy_rate,
        refusal=refusal
        or next(iter(refusals(sizes, run, sum(disk.values()), capacity)), None),
        notes=tuple(_notes(adapter, skeleton, run, solver, certified)),
    )


def _pattern_of(
    method: Any, sparsity: float | str | None, pattern: Pattern | str | None
) -> Pattern:
    """Pattern of single weights; a run that makes a model smaller is not planned."""
    if choose_structure(resolve(method), sparsity, pattern, StructureOptions()):
        message = (
            f"{solver_name(resolve(method))} would make a smaller model, of which there "
            f"is no plan: plan a method and a sparsity that write zeros"
        )
        raise UsageError(message)
    return choose_pattern(sparsity, pattern)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            message = f"{name} must be at least 1, got {value}"
            raise UsageError(message)


def _selection_error(
    model: Any,
    adapter: Adapter,
    entries: tuple[Sequence[str], Sequence[str]],
    pattern: Pattern,
) -> LayerwiseError | None:
    """Why a run would refuse these matrices; entries that match nothing raise at once."""
    try:
        Selection(model, adapter, *entries, pattern)
    except (UnsupportedModelError, InvalidProblemError) as error:
        return error
    return None


def _with_store(
    sizes: ModelShape, run: RunShape, activations: str, capacity: Capacity
) -> RunShape:
    """The run with its hidden states where they would be kept."""
    needed = hidden_states_bytes(sizes, run)
    return replace(run, on_disk=goes_to_disk(activations, needed, capacity.host))


def disk_of(source: Checkpoint, sizes: ModelShape, run: RunShape) -> dict[str, int]:
    """Bytes on the disk of the output when most of them are there."""
    weights = sum(block.weights for block in sizes.blocks)
    files = [*source.side_files(), *source.shards]
    found = {
        "pruned model": sum((source.path / name).stat().st_size for name in files),
        "masks": weights // 8,
        "finished blocks, until the end": weights * sizes.itemsize + weights // 8,
    }
    if run.workers > 1:
        count = run.workers + Rules().look_ahead
        found["inputs of blocks that wait for a worker"] = count * stream_bytes(sizes, run)
    if run.on_disk:
        found["hidden states"] = hidden_states_bytes(sizes, run)
    return found


def _notes(
    adapter: Adapter, model: Any, run: RunShape, solver: Any, certified: bool
) -> Iterator[str]:
    """What a reader of the figures should know."""
    if adapter.found:
        yield (
            f"no adapter is declared for this {type(model).__name__}: blocks "
            f"{adapter.blocks} were found by running it without numbers, and a run "
            f"proves them first"
        )
    if not run.streamed:
        yield "this run has the whole model in memory"
    if run.workspace is None:
        yield f"the memory and the time of {solver_name(solver)} itself are not known"
    if required_gradient(solver) is not None:
        yield "memory and time of the gradients are not counted"
    if certified:
        yield "memory and time of the proven gaps are not counted"

"""Plan of a run: what it would do, and its memory, disk space and time.

Everything follows from ``config.json``, the headers of the safetensors files and a few
quick measurements of this machine. The calibration text is not read: its size is known
from the arguments.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import (
    DataError,
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
from layerwise.run.activations.hidden_store import goes_to_disk
from layerwise.run.capacity import Capacity, capacity_of, own_memory, room
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.accounts import remarks
from layerwise.run.models.architecture import as_stored
from layerwise.run.models.headers import Headers
from layerwise.run.models.opening import OpenedModel
from layerwise.run.models.residency import InMemory
from layerwise.run.models.stored_types import weight_bytes
from layerwise.run.pipeline.destination import Destination
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.removal import Removal
from layerwise.run.settings import (
    Settings,
    choose_device,
)
from layerwise.run.steps import status
from layerwise.run.workers.schedule import Rules
from layerwise.solver import SolverLike


def plan_run(
    model: str | Path,
    method: SolverLike = "fista",
    sparsity: float | str | None = None,
    pattern: Pattern | str | None = None,
    *,
    tokenizer: Any = None,
    output_dir: str | Path | None = None,
    resume: bool = True,
    force: bool = False,
    **arguments: Any,
) -> Plan:
    """Plan what :func:`layerwise.prune_model` would do with the same arguments.

    No weight is read. The plan lists every matrix, with the reason if it is not pruned, the
    exact counts of zeros, the peak memory, the disk space and the time.

    Parameters
    ----------
    model
        A checkpoint folder or hub name.
    method, sparsity, pattern, tokenizer, arguments
        As for :func:`layerwise.prune_model`. The calibration text is not read and may be
        left out; a file that is named must be there.
    output_dir, resume, force
        Where the result would go; its free space is checked, and whether it exists already.

    Returns
    -------
    Plan
        With the reason in `refusal` if the run would not start or not finish.

    Raises
    ------
    UsageError, InvalidProblemError, UnsupportedModelError, DataError
        If an argument is impossible, an entry matches nothing, or the checkpoint is
        damaged or does not match its configuration, as `prune_model` would raise.
    """
    settings = Settings.of(method, sparsity, pattern, **arguments)
    inputs = model, settings.calibration.source
    destination = Destination.of(output_dir, resume=resume, force=force, inputs=inputs)
    asked = _pattern_of(settings.removal)
    status(f"reading the headers of {model}")
    source = Checkpoint.open(model)
    headers = Headers.read(source)
    skeleton = headers.model
    streamed = headers.one_to_one and not settings.removal.needs_whole_model
    settings.workers.check(settings.error_correction, streamable=streamed)
    length = settings.calibration.check(skeleton)
    settings.calibration.check_tokenizer(source, tokenizer)
    base = own_memory()
    adapter = as_stored(adapter_without_memory(skeleton), skeleton, source)
    opened = OpenedModel(InMemory(skeleton), adapter, source)
    settings = settings.for_model(opened)
    refusal = _in_the_way(destination) or _selection_error(settings, opened)
    entries = settings.targets, settings.ignore
    groups = inventory(skeleton, opened.adapter, *entries, asked)
    shapes = by_shape(groups)
    sizes = model_shape(skeleton, opened.adapter, shapes, length)
    place = choose_device(settings.device)
    capacity = capacity_of(place, destination.output)
    chosen = settings.removal.method
    run = _run_shape(settings, length, place, base, streamed=streamed)
    run = _with_store(sizes, run, settings.activations, capacity)
    disk = disk_of(source, sizes, run, weight_bytes(source, skeleton, shapes))
    status(f"measuring the rates of this machine on {place}")
    machine = quick_machine(place)
    stored = sum(entry.n_bytes for entry in source.entries().values())
    stages = estimates(
        skeleton,
        opened.adapter,
        chosen.solver,
        shapes,
        sizes,
        run,
        stored,
        machine,
        certify=bool(chosen.certify),
    )
    return Plan(
        model=str(model),
        method=chosen.name,
        pattern=str(asked),
        error_correction=settings.error_correction,
        device=str(place),
        n_sequences=settings.calibration.n_sequences,
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
        notes=tuple(_notes(opened, run, chosen)),
    )


def _run_shape(
    settings: Settings, length: int, device: torch.device, base: int, *, streamed: bool
) -> RunShape:
    """What the memory of a run depends on, besides the model."""
    pair = settings.error_correction in ("block", "full")
    return RunShape(
        n_sequences=settings.calibration.n_sequences,
        length=length,
        error_correction=settings.error_correction,
        base=base,
        accelerator=device.type != "cpu",
        workspace=workspace_of(settings.removal.method.solver, pair=pair),
        workers=settings.workers.count,
        streamed=streamed,
        store=room(device),
    )


def _pattern_of(removal: Removal[Any]) -> Pattern:
    """Pattern of the zeros; refuse to plan a run that removes something else."""
    if removal.pattern is None:
        message = (
            f"`plan` covers only runs that zero weights; {removal.method.name} with this "
            f"pattern does more: leave the pattern out, or choose another method"
        )
        raise UsageError(message)
    return removal.pattern


def _in_the_way(destination: Destination) -> LayerwiseError | None:
    """Return why a run could not write its output; nothing is touched."""
    try:
        destination.refuse()
    except (UsageError, DataError) as error:
        return error
    return None


def _selection_error(settings: Settings, opened: OpenedModel) -> LayerwiseError | None:
    """Error by which a run refuses these matrices; entries that match nothing raise."""
    try:
        settings.check_selection(opened)
    except (UnsupportedModelError, InvalidProblemError) as error:
        return error
    return None


def _with_store(
    sizes: ModelShape, run: RunShape, activations: str, capacity: Capacity
) -> RunShape:
    """Return the run with its hidden states in memory or on the disk."""
    needed = hidden_states_bytes(sizes, run)
    return replace(run, on_disk=goes_to_disk(activations, needed, capacity.host))


def disk_of(
    source: Checkpoint, sizes: ModelShape, run: RunShape, finished: int
) -> dict[str, int]:
    """Bytes of the output on the disk at its largest, by kind.

    `finished` are the bytes of all pruned weights in the types of their files.
    """
    weights = sum(block.weights for block in sizes.blocks)
    files = [*source.side_files(), *source.shards]
    sizes_on_disk = {
        "pruned model": sum((source.path / name).stat().st_size for name in files),
        "masks": weights // 8,
        "finished blocks, until the end": finished + weights // 8,
    }
    if run.workers > 1:
        count = run.workers + Rules().look_ahead
        waiting = count * stream_bytes(sizes, run)
        sizes_on_disk["inputs of blocks that wait for a worker"] = waiting
    if run.on_disk:
        sizes_on_disk["hidden states"] = hidden_states_bytes(sizes, run)
    return sizes_on_disk


def _notes(opened: OpenedModel, run: RunShape, method: Method) -> Iterator[str]:
    """Remarks for readers of the figures."""
    if opened.adapter.found:
        yield (
            f"no adapter is declared for this {type(opened.model).__name__}: blocks "
            f"{opened.adapter.blocks} were found by running it without numbers, and a run "
            f"proves them first"
        )
    if opened.source is not None:
        yield from remarks(opened.model, opened.source)
    if not run.streamed:
        yield "this run has the whole model in memory"
    if run.workspace is None:
        yield f"the memory and the time of {method.name} itself are not known"
    if method.gradient is not None:
        yield "memory and time of the gradients are not counted"
    if method.certify:
        yield "memory and time of the proven gaps are not counted"

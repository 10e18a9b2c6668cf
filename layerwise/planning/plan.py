"""What a run would do and what it would take, before it touches a weight.

Everything follows from ``config.json``, the headers of the safetensors files and a few
quick measurements of this machine. The calibration text is not read: its size is known
from the arguments.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from layerwise.planning.estimate import StageEstimate, estimates, quick_machine
from layerwise.planning.inventory import Group, by_shape, inventory
from layerwise.planning.memory_model import (
    Memory,
    ModelShape,
    Place,
    RunShape,
    memory_of,
    stream_bytes,
)
from layerwise.planning.model_shape import model_shape
from layerwise.planning.solver_costs import workspace_of
from layerwise.run.activations.dense_side import room
from layerwise.run.activations.hidden_store import LARGEST_SHARE, check_activations
from layerwise.run.capacity import Capacity, capacity_of, own_memory
from layerwise.run.channels.structure import StructureOptions, choose_structure
from layerwise.run.checkpoints.atomic import atomic_write
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


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Parameters
    ----------
    model, method, pattern, error_correction, device
        What was asked, as the recipe of a run would name it.
    n_sequences, length
        Of the calibration set.
    groups
        Every parameter of the model, with its fate.
    streamed
        Whether one block at a time is in memory, and not the whole model.
    on_disk
        Whether the hidden states between two blocks are files.
    sizes, memory
        Shapes behind the memory, and what is alive at the largest moments.
    disk
        Bytes by what they are, while the output is written.
    capacity
        What is free on this machine.
    stages
        Work, floor and expected time.
    gemm_rates, copy_rate
        Operations by type of number, and bytes, per second of this machine.
    refusal
        Why such a run would not start or not end, the first of all reasons.
    notes
        What the figures do not cover.
    """

    model: str
    method: str
    pattern: str
    error_correction: str
    device: str
    n_sequences: int
    length: int
    groups: tuple[Group, ...]
    streamed: bool
    on_disk: bool
    sizes: ModelShape
    memory: Memory
    disk: Mapping[str, int]
    capacity: Capacity
    stages: tuple[StageEstimate, ...]
    gemm_rates: Mapping[torch.dtype, float]
    copy_rate: float
    refusal: LayerwiseError | None
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All parameters of the model, tied ones once."""
        return sum(group.parameters for group in self.groups)

    @property
    def pruned(self) -> int:
        """Entries of the matrices that are pruned."""
        return sum(g.parameters for g in self.groups if g.fate == "pruned")

    @property
    def zeros(self) -> int:
        """Entries that the pattern removes."""
        return sum(group.zeros for group in self.groups)

    def check(self) -> None:
        """Raise the reason for which such a run would not start or not end, if any."""
        if self.refusal is not None:
            raise self.refusal

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it: bytes, seconds, operations."""
        asked = ("model", "method", "pattern", "error_correction", "device")
        places: tuple[Place, ...] = (
            ("host",) if self.device == "cpu" else ("host", "device")
        )
        widest = self.sizes.widest
        return {
            **{name: getattr(self, name) for name in asked},
            "n_sequences": self.n_sequences,
            "sequence_length": self.length,
            "streamed": self.streamed,
            "activations": "disk" if self.on_disk else "memory",
            "parameters": self.parameters,
            "pruned_parameters": self.pruned,
            "zeros": self.zeros,
            "layers": [_as_json(group) for group in self.groups],
            "memory": {
                place: {
                    "peak": self.memory.bytes(place),
                    "moment": self.memory.peak(place).name,
                    "moments": {
                        moment.name: {
                            item.name: item.bytes
                            for item in moment.items
                            if item.place == place
                        }
                        for moment in self.memory.moments
                    },
                }
                for place in places
            },
            "largest_gram": None if widest is None else widest.width,
            "disk": dict(self.disk),
            "free": asdict(self.capacity),
            "stages": [
                {
                    "stage": stage.stage,
                    "operations": {
                        _short(dtype): count for dtype, count in stage.work.flops.items()
                    },
                    "bytes": stage.work.bytes,
                    "floor_seconds": stage.floor,
                    "expected_seconds": stage.seconds,
                }
                for stage in self.stages
            ],
            "refused": None if self.refusal is None else str(self.refusal),
            "notes": list(self.notes),
        }

    def write(self, path: Path) -> None:
        """Write :meth:`to_dict` as a JSON file."""
        atomic_write(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())


def _as_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "count": group.count,
        "members": list(group.members),
        "shape": list(group.shape),
        "parameters": group.parameters,
        "fate": group.fate,
        "reason": group.reason,
        "zeros": group.zeros,
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    needed = stream_bytes(sizes, run) * (4 if run.error_correction == "full" else 2)
    free = capacity.host
    short = free is not None and needed * LARGEST_SHARE > free
    on_disk = activations == "disk" or (activations == "auto" and short)
    return replace(run, on_disk=on_disk)


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
        sets = 4 if run.error_correction == "full" else 2
        found["hidden states"] = sets * stream_bytes(sizes, run)
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

"""Advice for a run that does not fit: changes after which it fits, by the memory model."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from layerwise.errors import DataError, LayerwiseError, MemoryBudgetError
from layerwise.planning.memory_model import Memory, MemoryKind, memory_of
from layerwise.planning.shapes import ModelShape, RunShape
from layerwise.run.capacity import Capacity
from layerwise.run.pipeline.parallel import INDEPENDENT

MODES = ("block", "sequential", "none")  # mostly by decreasing memory


def refusals(
    model: ModelShape, run: RunShape, disk: int, capacity: Capacity
) -> list[LayerwiseError]:
    """Return the errors of a run for which this machine is too small; none if it fits.

    Parameters
    ----------
    model, run
        Shapes of the model and of the run.
    disk
        Bytes of the output at its largest.
    capacity
        Free memory and disk space.
    """
    memory = memory_of(model, run)
    errors: list[LayerwiseError] = []
    free: dict[MemoryKind, int | None] = {"host": capacity.host, "device": capacity.device}
    for kind, available in free.items():
        if available is not None and memory.bytes(kind) > available:
            errors.append(_memory_error(model, run, memory, kind, capacity))
    if capacity.disk is not None and disk > capacity.disk:
        message = (
            f"the output needs {in_units(disk)} on its disk, which has "
            f"{in_units(capacity.disk)} free: free {in_units(disk - capacity.disk)} more, "
            f"or choose an --output on another disk"
        )
        errors.append(DataError(message))
    return errors


def _memory_error(
    model: ModelShape, run: RunShape, memory: Memory, kind: MemoryKind, capacity: Capacity
) -> MemoryBudgetError:
    available = capacity.host if kind == "host" else capacity.device
    assert available is not None
    peak = memory.peak(kind)
    largest = max(
        (item for item in peak.items if item.kind == kind), key=lambda item: item.bytes
    )
    options = list(what_fits(model, run, capacity))
    advice = (
        f"what would fit: {', or '.join(options)}"
        if options
        else f"no setting of this run fits; take a {kind} with more memory"
    )
    message = (
        f"this run needs {in_units(peak.total(kind))} of {kind} memory and "
        f"{in_units(available)} are free; its largest part, {in_units(largest.bytes)}, is "
        f"{largest.name}: {advice}"
    )
    return MemoryBudgetError(message)


def what_fits(model: ModelShape, run: RunShape, capacity: Capacity) -> Iterator[str]:
    """Single changes after which a run fits, as options of the command line."""

    def fits(changed: RunShape) -> bool:
        memory = memory_of(model, changed)
        limits = ((capacity.host, "host"), (capacity.device, "device"))
        return all(
            limit is None or memory.bytes("host" if kind == "host" else "device") <= limit
            for limit, kind in limits
        )

    if not run.on_disk and fits(replace(run, on_disk=True)):
        yield "--activations disk"
    workers = _largest(run.workers, lambda n: fits(replace(run, workers=n)))
    if workers:
        yield f"--workers {workers}"
    sequences = _largest(run.n_sequences, lambda n: fits(replace(run, n_sequences=n)))
    if sequences:
        yield f"--n-sequences {sequences}"
    length = _largest(run.length, lambda n: fits(replace(run, length=n)))
    if length:
        yield f"--sequence-length {length}"
    for mode in MODES if run.workers == 1 else INDEPENDENT:
        changed = replace(run, error_correction=mode)
        if mode != run.error_correction and fits(changed):
            yield f"--error-correction {mode}"
            break
    if run.accelerator and fits(replace(run, accelerator=False)):
        yield "--device cpu"


def _largest(current: int, fits: Callable[[int], bool]) -> int:
    """Largest number below the current one that fits; 0 if none fits."""
    low, high = 0, current
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def in_units(size: float) -> str:
    """Format a number of bytes in MiB or GiB."""
    if size < 1 << 30:
        return f"{size / (1 << 20):,.0f} MiB"
    return f"{size / (1 << 30):,.1f} GiB"

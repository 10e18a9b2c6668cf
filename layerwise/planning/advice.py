"""A run that does not fit, and what would: computed with the memory model, not guessed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from layerwise.errors import DataError, LayerwiseError, MemoryBudgetError
from layerwise.planning.memory_model import Memory, Place, memory_of
from layerwise.planning.shapes import ModelShape, RunShape
from layerwise.run.capacity import Capacity
from layerwise.run.pipeline.parallel import INDEPENDENT

PLACES: Mapping[Place, str] = MappingProxyType({"host": "host", "device": "device"})
MODES = ("block", "sequential", "none")  # by falling memory, mostly


def refusals(
    model: ModelShape, run: RunShape, disk: int, capacity: Capacity
) -> list[LayerwiseError]:
    """Errors of a run that this machine cannot hold; none if it can.

    Parameters
    ----------
    model, run
        Their shapes.
    disk
        Bytes that the output needs at its largest.
    capacity
        What is free.
    """
    memory = memory_of(model, run)
    found: list[LayerwiseError] = []
    free: dict[Place, int | None] = {"host": capacity.host, "device": capacity.device}
    for place, available in free.items():
        if available is not None and memory.bytes(place) > available:
            found.append(_memory_error(model, run, memory, place, capacity))
    if capacity.disk is not None and disk > capacity.disk:
        message = (
            f"the output needs {in_units(disk)} on its disk, which has "
            f"{in_units(capacity.disk)} free: free {in_units(disk - capacity.disk)} more, "
            f"or choose an --output on another disk"
        )
        found.append(DataError(message))
    return found


def _memory_error(
    model: ModelShape, run: RunShape, memory: Memory, place: Place, capacity: Capacity
) -> MemoryBudgetError:
    available = capacity.host if place == "host" else capacity.device
    assert available is not None
    peak = memory.peak(place)
    largest = max(
        (item for item in peak.items if item.place == place), key=lambda item: item.bytes
    )
    options = list(what_fits(model, run, capacity))
    advice = (
        f"what would fit: {', or '.join(options)}"
        if options
        else f"no setting of this run fits; take a {place} with more memory"
    )
    message = (
        f"this run needs {in_units(peak.total(place))} of {PLACES[place]} memory and "
        f"{in_units(available)} are free; most of it, {in_units(largest.bytes)}, is "
        f"{largest.name}: {advice}"
    )
    return MemoryBudgetError(message)


def what_fits(model: ModelShape, run: RunShape, capacity: Capacity) -> Iterator[str]:
    """Single changes of a run after which it fits, as a user would type them."""

    def fits(changed: RunShape) -> bool:
        memory = memory_of(model, changed)
        limits = ((capacity.host, "host"), (capacity.device, "device"))
        return all(
            limit is None or memory.bytes("host" if place == "host" else "device") <= limit
            for limit, place in limits
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
    """Largest number below the current one that fits, 0 if none does."""
    low, high = 0, current
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def in_units(size: float) -> str:
    """Bytes in MiB or GiB."""
    if size < 1 << 30:
        return f"{size / (1 << 20):,.0f} MiB"
    return f"{size / (1 << 30):,.1f} GiB"

"""Peak memory of a run from shapes alone, without a model or a tensor.

A run has a few instants at which its memory can be largest: the embeddings are loaded for
the capture; a block is run over all sequences; the grams of a stage are finished; the
problem of a matrix is solved; a block is written. For each of them this module adds up
the bytes of everything that is alive. Sizes are in bytes. Counts of tokens are those of
the whole calibration set unless a batch is named.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from layerwise.accumulator import sums_drift_gram
from layerwise.chunks import SLAB
from layerwise.planning.shapes import BlockShape, ModelShape, RunShape, StageShape
from layerwise.run.activations.dense_side import fits
from layerwise.run.activations.hidden_store import hidden_bytes, n_sets

MemoryKind = Literal["host", "device"]

GRAM_ITEM = 8  # float64
LOOK = 2  # boolean bytes per entry of a tensor that is checked, besides a copy of it
LARGE_ARRAY = 32 << 20  # bytes from which the C library returns freed memory at once
KEPT = 0.3  # measured share of smaller arrays that the C library keeps
DEVICE_BASE = 512 << 20  # context and libraries on an accelerator, besides the tensors
HOST_WITH_DEVICE = 1 << 30  # host memory of the libraries of an accelerator

BATCH_NAME = "a batch on its way through the block"
COPY = "copy of the block for the dense side"
INPUTS = "inputs of the stages that are left"
SETTLED = "outputs of modules that are settled"
RESULTS = "pruned weights and masks of the block"


@dataclass(frozen=True)
class Item:
    """One part of the memory at an instant."""

    name: str
    bytes: int
    kind: MemoryKind


@dataclass(frozen=True)
class Instant:
    """An instant of a run, and everything that is alive at it."""

    name: str
    items: tuple[Item, ...]

    def total(self, kind: MemoryKind) -> int:
        """Bytes in one kind of memory."""
        return sum(item.bytes for item in self.items if item.kind == kind)


@dataclass(frozen=True)
class Memory:
    """Instants of a run at which its memory can be largest."""

    instants: tuple[Instant, ...]

    def peak(self, kind: MemoryKind) -> Instant:
        """Instant at which one kind of memory holds most bytes."""
        return max(self.instants, key=lambda instant: instant.total(kind))

    def bytes(self, kind: MemoryKind) -> int:
        """Largest number of bytes in one kind of memory."""
        return self.peak(kind).total(kind)


def memory_of(model: ModelShape, run: RunShape) -> Memory:
    """Bytes that are alive at every instant of a run at which its memory can be largest.

    Parameters
    ----------
    model, run
        Shapes of the model and of the run.
    """
    instants = [_opening(model, run), _capture(model, run)]
    for block in dict.fromkeys(model.blocks):  # most blocks are alike
        instants += [_advance(model, run, block), *_stages(model, run, block)]
        instants.append(_write(model, run, block))
    largest: dict[str, Instant] = {}
    for instant in instants:
        known = largest.get(instant.name)
        if known is None or _both(instant) > _both(known):
            largest[instant.name] = instant
    if run.workers == 1:
        return Memory(tuple(largest.values()))
    driver = _driver(model, run)
    return Memory(tuple(_of_workers(m, run.workers, driver) for m in largest.values()))


def gram_bytes(width: int) -> int:
    """Bytes of one gram of a stage."""
    return GRAM_ITEM * width * width


def stream_bytes(model: ModelShape, run: RunShape) -> int:
    """Bytes of the hidden states of the calibration set between two blocks."""
    return run.tokens * model.hidden * model.itemsize


def hidden_states_bytes(model: ModelShape, run: RunShape) -> int:
    """Bytes of all sets of hidden states that exist at one time."""
    return hidden_bytes(run.error_correction, run.tokens, model.hidden, model.itemsize)


def _both(instant: Instant) -> int:
    return instant.total("host") + instant.total("device")


def _driver(model: ModelShape, run: RunShape) -> tuple[Item, ...]:
    """Memory of the driver, which runs the dense model one block at a time."""
    block = max((b.parameters for b in model.blocks), default=0)
    items = [
        Item("driver: Python, PyTorch, transformers", run.base, "host"),
        Item("driver: block", model.itemsize * block, "host"),
    ]
    if not run.on_disk:
        items.append(Item("driver: hidden states", 2 * stream_bytes(model, run), "host"))
    return tuple(items)


def _of_workers(instant: Instant, workers: int, driver: tuple[Item, ...]) -> Instant:
    """Instant at which all workers are at the given one, with the driver besides."""
    items = [
        Item(f"{workers} x {item.name}", workers * item.bytes, item.kind)
        for item in instant.items
    ]
    return Instant(instant.name, (*items, *driver))


def _instant(name: str, run: RunShape, items: Iterable[tuple[str, float, bool]]) -> Instant:
    """Instant of items: name, bytes, and whether they are where blocks are computed."""
    base = [Item("Python, PyTorch, transformers", run.base, "host")]
    if run.accelerator:
        base.append(Item("libraries of the device", HOST_WITH_DEVICE, "host"))
        base.append(Item("context of the device", DEVICE_BASE, "device"))
    kinds: dict[bool, MemoryKind] = {True: "device" if run.accelerator else "host"}
    kinds[False] = "host"
    return Instant(
        name,
        (
            *base,
            *(
                Item(what, int(size), kinds[computed])
                for what, size, computed in items
                if size
            ),
        ),
    )


def _opening(model: ModelShape, run: RunShape) -> Instant:
    """Check of every tensor for entries that are not finite."""
    size = (model.itemsize + LOOK) * model.largest
    items: list[tuple[str, float, bool]] = [("a look at the largest tensor", size, False)]
    if not run.streamed:
        items.append(_whole(model))
    return _instant("check of the checkpoint", run, items)


def _capture(model: ModelShape, run: RunShape) -> Instant:
    block = max((b.parameters for b in model.blocks), default=0)
    return _instant(
        "capture of the embeddings",
        run,
        [
            *(
                [
                    ("embeddings and norms", model.itemsize * model.embeddings, False),
                    ("first block", model.itemsize * block, False),
                ]
                if run.streamed
                else [_whole(model)]
            ),
            _streams(model, run, 1),
        ],
    )


def _streams(model: ModelShape, run: RunShape, count: int) -> tuple[str, float, bool]:
    """Hidden states in memory: all of them, or one batch if they are files."""
    size = stream_bytes(model, run)
    if run.on_disk:
        size = run.batch * run.length * model.hidden * model.itemsize
    name = "hidden states" if count == 1 else f"{count} x hidden states"
    return name, count * size, False


def _whole(model: ModelShape) -> tuple[str, float, bool]:
    return "the whole model", model.itemsize * model.parameters, False


def _present(
    model: ModelShape, run: RunShape, block: BlockShape
) -> list[tuple[str, float, bool]]:
    """Parameters in memory while a block is pruned."""
    own = ("block", model.itemsize * block.parameters, True)
    if run.streamed:
        return [own]
    return [_whole(model), own] if run.accelerator else [_whole(model)]


def _held(run: RunShape) -> int:
    """Sets of hidden states while a block is pruned: before and after it."""
    return {"sequential": 1, "full": 3}.get(run.error_correction, 2)


def _working(model: ModelShape, run: RunShape) -> float:
    return run.batch * model.working_bytes(run.length)


def _advance(model: ModelShape, run: RunShape, block: BlockShape) -> Instant:
    return _instant(
        "pass through a block",
        run,
        [
            *_present(model, run, block),
            _streams(model, run, n_sets(run.error_correction)),
            (BATCH_NAME, _working(model, run), True),
        ],
    )


def _stages(model: ModelShape, run: RunShape, block: BlockShape) -> list[Instant]:
    """Instants of every stage: its inputs are summed, its problems are solved."""
    own = model.itemsize * block.parameters
    present = [*_present(model, run, block), _streams(model, run, _held(run))]
    left = _stored(model, run, block)
    instants = []
    if left:
        batch = (BATCH_NAME, _working(model, run), True)
        kept = (INPUTS, sum(left), True)
        instants.append(_instant("pass that keeps inputs", run, [*present, kept, batch]))
    done = settled = 0
    for index, stage in enumerate(block.stages):
        rest: list[tuple[str, float, bool]] = [*present]
        if run.staged and not left:
            rest.append((COPY, own, True))
        first = index == 0 and run.error_correction == "block"
        sums = _sums(run, block, stage, pair=run.staged and not first)
        # the activations of the pass that yields a batch are alive while it is added
        gathering = _working(model, run) + _update(run, stage)
        known = settled  # and below, the inputs of the module that will be settled
        if left and stage.passes_through and not first:
            known += left[index]
            settled += run.tokens * stage.rows[0] * model.itemsize
        instants.append(
            _instant(
                "sums over the inputs of a stage",
                run,
                [
                    *rest,
                    (INPUTS, sum(left[index:]), True),
                    (SETTLED, known, True),
                    (RESULTS, done, False),
                    (*sums, True),
                    (BATCH_NAME, gathering, True),
                ],
            )
        )
        done += stage.weights * (model.itemsize + 1)
        instants.append(
            _instant(
                "problem of a matrix",
                run,
                [
                    *rest,
                    (INPUTS, sum(left[index + 1 :]), True),
                    (SETTLED, known, True),
                    (RESULTS, done, False),
                    (*sums, True),
                    *_problem(run, stage, sums[1]),
                ],
            )
        )
    return instants


def _stored(model: ModelShape, run: RunShape, block: BlockShape) -> list[int]:
    """Bytes of the inputs of every stage of the dense block, if all of them fit."""
    sizes = [run.tokens * stage.width * model.itemsize for stage in block.stages]
    kept = fits(block.widths, run.tokens, model.itemsize, run.store)
    return sizes if run.staged and kept else []


def _sums(
    run: RunShape, block: BlockShape, stage: StageShape, *, pair: bool
) -> tuple[str, int]:
    """Sums of second moments: of one stage, or of all stages if they are independent."""
    if not run.staged:
        return "grams of all stages", sum(gram_bytes(s.width) for s in block.stages)
    if not pair:
        return "gram", gram_bytes(stage.width)
    if sums_drift_gram(sum(stage.rows), stage.width):
        return "gram, cross-gram and drift", 3 * gram_bytes(stage.width)
    return "gram and cross-gram", 2 * gram_bytes(stage.width)


def _update(run: RunShape, stage: StageShape) -> float:
    """Bytes of a batch in float32, and of a slab of the product that is added."""
    rows = run.batch * run.length
    copies = 3 if run.staged else 1
    return 4.0 * (copies * rows + SLAB) * stage.width


def _problem(run: RunShape, stage: StageShape, sums: int) -> list[tuple[str, float, bool]]:
    """Workspace of the largest matrix of a stage, and freed memory that is kept."""
    if run.workspace is None:
        return []
    rows = max(stage.rows)
    need = run.workspace.bytes(rows, stage.width, accelerator=run.accelerator)
    items: list[tuple[str, float, bool]] = [("workspace of the solver", need, True)]
    if not run.accelerator and 4 * rows * stage.width < LARGE_ARRAY:
        items.append(("what the C library keeps for later", KEPT * (need + sums), True))
    return items


def _write(model: ModelShape, run: RunShape, block: BlockShape) -> Instant:
    weights = block.weights
    return _instant(
        "write of a block",
        run,
        [
            *_present(model, run, block),
            _streams(model, run, _held(run)),
            (RESULTS, weights * (model.itemsize + 1), False),
            ("the same as a file", weights * model.itemsize + weights // 8, False),
        ],
    )

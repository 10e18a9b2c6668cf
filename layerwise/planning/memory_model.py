"""What a run keeps in memory at its peaks, from shapes alone: no model, no tensor.

A run passes through a few moments that can be the largest: the embeddings are there for
the capture; a block is run over all sequences; the grams of a stage are finished; the
problem of a matrix is solved; a block is written. For each of them this module adds up
the bytes of everything that is alive. Sizes are in bytes, counts of tokens are those of
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

Place = Literal["host", "device"]

GRAM_ITEM = 8  # float64
LOOK = 2  # truth values per entry of a tensor that is checked, beside a copy of it
LARGE_ARRAY = 32 << 20  # bytes from which the C library gives back what is freed
KEPT = 0.3  # of arrays that are smaller, as measured
DEVICE_BASE = 512 << 20  # context and libraries of an accelerator, beside its tensors
HOST_WITH_DEVICE = 1 << 30  # what they add to the process

BATCH_NAME = "a batch on its way through the block"
COPY = "copy of the block for the dense side"
INPUTS = "inputs of the stages that are left"
SETTLED = "outputs of modules that are settled"
RESULTS = "pruned weights and masks of the block"


@dataclass(frozen=True)
class Item:
    """Something that is alive at a moment."""

    name: str
    bytes: int
    place: Place


@dataclass(frozen=True)
class Moment:
    """A moment of a run, and all that is alive at it."""

    name: str
    items: tuple[Item, ...]

    def total(self, place: Place) -> int:
        """Bytes in one place."""
        return sum(item.bytes for item in self.items if item.place == place)


@dataclass(frozen=True)
class Memory:
    """Moments of a run of which one is the largest."""

    moments: tuple[Moment, ...]

    def peak(self, place: Place) -> Moment:
        """Moment at which most bytes are in a place."""
        return max(self.moments, key=lambda moment: moment.total(place))

    def bytes(self, place: Place) -> int:
        """Bytes at that moment."""
        return self.peak(place).total(place)


def memory_of(model: ModelShape, run: RunShape) -> Memory:
    """Bytes that are alive at every moment of a run that can be its largest.

    Parameters
    ----------
    model, run
        Their shapes.
    """
    moments = [_opening(model, run), _capture(model, run)]
    for block in dict.fromkeys(model.blocks):  # most are alike
        moments += [_advance(model, run, block), *_stages(model, run, block)]
        moments.append(_write(model, run, block))
    largest: dict[str, Moment] = {}
    for moment in moments:
        known = largest.get(moment.name)
        if known is None or _both(moment) > _both(known):
            largest[moment.name] = moment
    if run.workers == 1:
        return Memory(tuple(largest.values()))
    driver = _driver(model, run)
    return Memory(tuple(_of_workers(m, run.workers, driver) for m in largest.values()))


def gram_bytes(width: int) -> int:
    """Bytes of one gram of a stage."""
    return GRAM_ITEM * width * width


def stream_bytes(model: ModelShape, run: RunShape) -> int:
    """Hidden states of the calibration set between two blocks."""
    return run.tokens * model.hidden * model.itemsize


def hidden_states_bytes(model: ModelShape, run: RunShape) -> int:
    """Hidden states of all sets that live at a time."""
    return hidden_bytes(run.error_correction, run.tokens, model.hidden, model.itemsize)


def _both(moment: Moment) -> int:
    return moment.total("host") + moment.total("device")


def _driver(model: ModelShape, run: RunShape) -> tuple[Item, ...]:
    """What hands out the blocks: it runs the dense model, one block at a time."""
    block = max((b.parameters for b in model.blocks), default=0)
    items = [
        Item("driver: Python, PyTorch, transformers", run.base, "host"),
        Item("driver: block", model.itemsize * block, "host"),
    ]
    if not run.on_disk:
        items.append(Item("driver: hidden states", 2 * stream_bytes(model, run), "host"))
    return tuple(items)


def _of_workers(moment: Moment, workers: int, driver: tuple[Item, ...]) -> Moment:
    """The moment of every worker at once, and the driver beside them."""
    items = [
        Item(f"{workers} x {item.name}", workers * item.bytes, item.place)
        for item in moment.items
    ]
    return Moment(moment.name, (*items, *driver))


def _moment(name: str, run: RunShape, items: Iterable[tuple[str, float, bool]]) -> Moment:
    """Moment of items: name, bytes, and whether they lie where blocks are computed."""
    base = [Item("Python, PyTorch, transformers", run.base, "host")]
    if run.accelerator:
        base.append(Item("libraries of the device", HOST_WITH_DEVICE, "host"))
        base.append(Item("context of the device", DEVICE_BASE, "device"))
    places: dict[bool, Place] = {True: "device" if run.accelerator else "host"}
    places[False] = "host"
    return Moment(
        name,
        (
            *base,
            *(
                Item(what, int(size), places[computed])
                for what, size, computed in items
                if size
            ),
        ),
    )


def _opening(model: ModelShape, run: RunShape) -> Moment:
    """Every tensor is looked at once: whether its entries are finite."""
    size = (model.itemsize + LOOK) * model.largest
    items: list[tuple[str, float, bool]] = [("a look at the largest tensor", size, False)]
    if not run.streamed:
        items.append(_whole(model))
    return _moment("check of the checkpoint", run, items)


def _capture(model: ModelShape, run: RunShape) -> Moment:
    block = max((b.parameters for b in model.blocks), default=0)
    return _moment(
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
    """Hidden states that are in memory; of files, a batch."""
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
    """Parameters that are there while a block is worked on."""
    own = ("block", model.itemsize * block.parameters, True)
    if run.streamed:
        return [own]
    return [_whole(model), own] if run.accelerator else [_whole(model)]


def _held(run: RunShape) -> int:
    """Sets of hidden states while a block is pruned: in front of it and behind it."""
    return {"sequential": 1, "full": 3}.get(run.error_correction, 2)


def _working(model: ModelShape, run: RunShape) -> float:
    return run.batch * model.working_bytes(run.length)


def _advance(model: ModelShape, run: RunShape, block: BlockShape) -> Moment:
    return _moment(
        "pass through a block",
        run,
        [
            *_present(model, run, block),
            _streams(model, run, n_sets(run.error_correction)),
            (BATCH_NAME, _working(model, run), True),
        ],
    )


def _stages(model: ModelShape, run: RunShape, block: BlockShape) -> list[Moment]:
    """The moments of every stage: its inputs are summed, its problems solved."""
    own = model.itemsize * block.parameters
    present = [*_present(model, run, block), _streams(model, run, _held(run))]
    left = _stored(model, run, block)
    moments = []
    if left:
        batch = (BATCH_NAME, _working(model, run), True)
        kept = (INPUTS, sum(left), True)
        moments.append(_moment("pass that keeps inputs", run, [*present, kept, batch]))
    done = settled = 0
    for index, stage in enumerate(block.stages):
        rest: list[tuple[str, float, bool]] = [*present]
        if run.staged and not left:
            rest.append((COPY, own, True))
        first = index == 0 and run.error_correction == "block"
        sums = _sums(run, block, stage, pair=run.staged and not first)
        gathering = max(_working(model, run), _update(run, stage))
        known = settled  # and the inputs of what will be
        if left and stage.ends and not first:
            known += left[index]
            settled += run.tokens * stage.rows[0] * model.itemsize
        moments.append(
            _moment(
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
        moments.append(
            _moment(
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
    return moments


def _stored(model: ModelShape, run: RunShape, block: BlockShape) -> list[int]:
    """Inputs of every stage of the dense block, if all of them fit the store."""
    sizes = [run.tokens * stage.width * model.itemsize for stage in block.stages]
    kept = fits(block.widths, run.tokens, model.itemsize, run.store)
    return sizes if run.staged and kept else []


def _sums(
    run: RunShape, block: BlockShape, stage: StageShape, *, pair: bool
) -> tuple[str, int]:
    """Sums of second moments: of one stage, or of all at once where none waits."""
    if not run.staged:
        return "grams of all stages", sum(gram_bytes(s.width) for s in block.stages)
    if not pair:
        return "gram", gram_bytes(stage.width)
    if sums_drift_gram(sum(stage.rows), stage.width):
        return "gram, cross-gram and drift", 3 * gram_bytes(stage.width)
    return "gram and cross-gram", 2 * gram_bytes(stage.width)


def _update(run: RunShape, stage: StageShape) -> float:
    """A batch of inputs in float32, and a slab of the product that is added to the sum."""
    rows = run.batch * run.length
    copies = 3 if run.staged else 1
    return 4.0 * (copies * rows + SLAB) * stage.width


def _problem(run: RunShape, stage: StageShape, sums: int) -> list[tuple[str, float, bool]]:
    """Workspace of the largest matrix of a stage, and what freed arrays leave behind."""
    if run.workspace is None:
        return []
    rows = max(stage.rows)
    need = run.workspace.bytes(rows, stage.width, accelerator=run.accelerator)
    items: list[tuple[str, float, bool]] = [("workspace of the solver", need, True)]
    if not run.accelerator and 4 * rows * stage.width < LARGE_ARRAY:
        items.append(("what the C library keeps for later", KEPT * (need + sums), True))
    return items


def _write(model: ModelShape, run: RunShape, block: BlockShape) -> Moment:
    weights = block.weights
    return _moment(
        "write of a block",
        run,
        [
            *_present(model, run, block),
            _streams(model, run, _held(run)),
            (RESULTS, weights * (model.itemsize + 1), False),
            ("the same as a file", weights * model.itemsize + weights // 8, False),
        ],
    )

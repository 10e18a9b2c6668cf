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

Place = Literal["host", "device"]

BATCH = 8  # sequences that go through a block together
GRAM_ITEM = 8  # float64
MOST_ROWS = 512  # that a refit works on together on a processor
ARRAYS = 16  # of the width, that it plans for a row
LOOK = 2  # truth values per entry of a tensor that is checked, beside a copy of it
SLAB = 512  # rows of a product that are made at a time
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
class StageShape:
    """Matrices of a block that share their inputs: the width, and the rows of each.

    `ends` says that they are one matrix, whose output may be that of a module around it
    (:mod:`layerwise.run.activations.endings`).
    """

    width: int
    rows: tuple[int, ...]
    ends: bool = False

    @property
    def weights(self) -> int:
        """Entries of all its matrices."""
        return self.width * sum(self.rows)


@dataclass(frozen=True)
class BlockShape:
    """Parameters of a block, and the stages that are pruned in it."""

    parameters: int
    stages: tuple[StageShape, ...]

    @property
    def weights(self) -> int:
        """Entries of all matrices that are pruned."""
        return sum(stage.weights for stage in self.stages)


@dataclass(frozen=True)
class ModelShape:
    """A model as far as memory is concerned.

    Parameters
    ----------
    blocks
        In their order.
    embeddings
        Parameters outside the blocks that lie in front of them or hold state.
    head
        Parameters of the output head where they are its own; a run does not need them.
    largest
        Entries of the largest tensor.
    hidden
        Channels between the blocks.
    itemsize
        Bytes of a parameter and of an activation.
    working
        Bytes that a pass of one sequence through a block needs beside its input, at
        some lengths, which grow.
    """

    blocks: tuple[BlockShape, ...]
    embeddings: int
    head: int
    largest: int
    hidden: int
    itemsize: int
    working: tuple[tuple[int, float], ...]

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return self.embeddings + self.head + sum(b.parameters for b in self.blocks)

    def working_bytes(self, length: int) -> float:
        """Bytes that a sequence needs inside a block, between the lengths by a line."""
        before = (0, 0.0)
        for after in self.working:
            if length <= after[0]:
                share = (length - before[0]) / (after[0] - before[0])
                return before[1] + share * (after[1] - before[1])
            before = after
        return before[1] * length / before[0]

    @property
    def widest(self) -> StageShape | None:
        """Stage with the largest gram."""
        stages = [stage for block in self.blocks for stage in block.stages]
        return max(stages, key=lambda stage: stage.width, default=None)


@dataclass(frozen=True)
class Peak:
    """Arrays that a solver holds at one point of its work, beside the problem.

    Parameters
    ----------
    matrices
        Of the size of the matrix, in units of 8 bytes an entry.
    grams
        Of the size of the gram, likewise.
    rows
        Of the width, for every row that is worked on together, likewise.
    """

    matrices: float = 0.0
    grams: float = 0.0
    rows: float = 0.0


@dataclass(frozen=True)
class Workspace:
    """What a solver needs for one matrix: the largest of its peaks.

    Parameters
    ----------
    peaks
        Of the solver, and of posing and grading the problem.
    budget
        Bytes for rows that are worked on together.
    """

    peaks: tuple[Peak, ...]
    budget: int = 1 << 30

    def bytes(self, rows: int, width: int, *, accelerator: bool = False) -> int:
        """Bytes for a matrix (rows, width)."""
        most = rows if accelerator else MOST_ROWS

        def size(peak: Peak) -> float:
            chunk = min(rows, most, self.budget // (ARRAYS * 8 * width))
            arrays = peak.matrices * rows + peak.rows * chunk + peak.grams * width
            return 8.0 * arrays * width

        return int(max(map(size, self.peaks), default=0.0))


@dataclass(frozen=True)
class RunShape:
    """Settings of a run that decide its memory.

    Parameters
    ----------
    n_sequences, length
        Of the calibration set.
    error_correction
        Mode, see :mod:`layerwise.run.pipeline.blocks`.
    base
        Bytes of Python, PyTorch and transformers.
    accelerator
        Whether blocks are computed on another device than the host.
    workspace
        Of the solver; None where no model of it is known, and nothing is counted.
    workers
        Processes that prune blocks at the same time.
    on_disk
        Whether hidden states between the blocks are files.
    streamed
        Whether one block at a time is in memory, and not the whole model.
    store
        Bytes that the inputs of the stages of a block may take where it is computed.
    """

    n_sequences: int
    length: int
    error_correction: str
    base: int
    accelerator: bool = False
    workspace: Workspace | None = None
    workers: int = 1
    on_disk: bool = False
    streamed: bool = True
    store: int = 1 << 30

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return self.n_sequences * self.length

    @property
    def batch(self) -> int:
        """Sequences of the largest batch."""
        return min(BATCH, self.n_sequences)

    @property
    def staged(self) -> bool:
        """Whether a stage sees the effect of the pruned stages before it."""
        return self.error_correction in ("block", "full")


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
    streams = 4 if run.error_correction == "full" else 2
    return _moment(
        "pass through a block",
        run,
        [
            *_present(model, run, block),
            _streams(model, run, streams),
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
    fits = run.staged and len(sizes) > 1 and sum(sizes) <= run.store
    return sizes if fits else []


def _sums(
    run: RunShape, block: BlockShape, stage: StageShape, *, pair: bool
) -> tuple[str, int]:
    """Sums of second moments: of one stage, or of all at once where none waits."""
    if not run.staged:
        return "grams of all stages", sum(gram_bytes(s.width) for s in block.stages)
    if not pair:
        return "gram", gram_bytes(stage.width)
    if 2 * sum(stage.rows) > stage.width:  # else the outputs are fewer than the inputs
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

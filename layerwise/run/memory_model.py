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
ARRAYS = 12  # of the width, that it plans for a row
STORE = 1 << 30  # inputs of the stages of a dense block that are kept, at most
DEVICE_BASE = 512 << 20  # context and libraries of an accelerator, beside its tensors
HOST_WITH_DEVICE = 1 << 30  # what they add to the process


@dataclass(frozen=True)
class StageShape:
    """Matrices of a block that share their inputs: the width, and the rows of each."""

    width: int
    rows: tuple[int, ...]

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

    def bytes(self, rows: int, width: int) -> int:
        """Bytes for a matrix (rows, width)."""

        def size(peak: Peak) -> float:
            chunk = min(rows, MOST_ROWS, self.budget // (ARRAYS * 8 * width))
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
        Mode, see :mod:`layerwise.run.pipeline`.
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
    moments = [_capture(model, run)]
    for block in dict.fromkeys(model.blocks):  # most are alike
        moments += [_advance(model, run, block), *_stages(model, run, block)]
        moments.append(_write(model, run, block))
    largest: dict[str, Moment] = {}
    for moment in moments:
        known = largest.get(moment.name)
        if known is None or _both(moment) > _both(known):
            largest[moment.name] = moment
    return Memory(tuple(_times(moment, run.workers) for moment in largest.values()))


def gram_bytes(width: int) -> int:
    """Bytes of one gram of a stage."""
    return GRAM_ITEM * width * width


def stream_bytes(model: ModelShape, run: RunShape) -> int:
    """Hidden states of the calibration set between two blocks."""
    return run.tokens * model.hidden * model.itemsize


def _both(moment: Moment) -> int:
    return moment.total("host") + moment.total("device")


def _times(moment: Moment, workers: int) -> Moment:
    """The moment of every worker at once."""
    if workers == 1:
        return moment
    items = [
        Item(f"{workers} x {item.name}", workers * item.bytes, item.place)
        for item in moment.items
    ]
    return Moment(moment.name, tuple(items))


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
            ("a batch on its way through the block", _working(model, run), True),
        ],
    )


def _stages(model: ModelShape, run: RunShape, block: BlockShape) -> list[Moment]:
    """The moments of the largest stage: its inputs are summed, its problems solved."""
    own = model.itemsize * block.parameters
    common = _present(model, run, block)
    if run.staged:
        common.append(("copy of the block for the dense side", own, True))
        common.append(("inputs of its stages", _stored(model, run, block), True))
    common.append(_streams(model, run, _held(run)))
    moments = []
    done = 0
    for stage in block.stages:
        results = [("pruned weights and masks of the block", done, False)]
        sums = _sums(run, block, stage)
        gathering = max(_working(model, run), _update(model, run, stage))
        moments.append(
            _moment(
                "sums over the inputs of a stage",
                run,
                [
                    *common,
                    *results,
                    (sums[0], sums[1], True),
                    ("a batch on its way", gathering, True),
                ],
            )
        )
        done += stage.weights * (model.itemsize + 1)
        results = [("pruned weights and masks of the block", done, False)]
        moments.append(
            _moment(
                "problem of a matrix",
                run,
                [*common, *results, *_problem(run, block, stage)],
            )
        )
    return moments


def _stored(model: ModelShape, run: RunShape, block: BlockShape) -> int:
    """Inputs of all stages of the dense block, if they fit the store."""
    size = run.tokens * sum(stage.width for stage in block.stages) * model.itemsize
    return size if len(block.stages) > 1 and size <= STORE else 0


def _sums(run: RunShape, block: BlockShape, stage: StageShape) -> tuple[str, int]:
    """Sums of second moments: of a pair three, else one for every stage at once."""
    if run.staged:
        return "gram, cross-gram and drift", 3 * gram_bytes(stage.width)
    return "grams of all stages", sum(gram_bytes(s.width) for s in block.stages)


def _update(model: ModelShape, run: RunShape, stage: StageShape) -> float:
    """A batch of inputs in float32, and the product that is added to the sum."""
    rows = run.batch * run.length
    copies = 5 if run.staged else 2
    return 4.0 * copies * rows * stage.width + 4.0 * stage.width**2


def _problem(
    run: RunShape, block: BlockShape, stage: StageShape
) -> list[tuple[str, float, bool]]:
    """Moments of a stage, the same scaled, and the workspace of its largest matrix."""
    name, size = _sums(run, block, stage)
    pair = 2 if run.staged else 1
    items: list[tuple[str, float, bool]] = [
        (name, size, True),
        ("their averages, and those scaled", 2 * pair * gram_bytes(stage.width), True),
    ]
    if run.workspace is not None:
        largest = max(stage.rows)
        need = run.workspace.bytes(largest, stage.width)
        items.append(("workspace of the solver", need, True))
    return items


def _write(model: ModelShape, run: RunShape, block: BlockShape) -> Moment:
    weights = block.weights
    return _moment(
        "write of a block",
        run,
        [
            *_present(model, run, block),
            _streams(model, run, _held(run)),
            ("pruned weights and masks of the block", weights * (model.itemsize + 1), False),
            ("the same as a file", weights * model.itemsize + weights // 8, False),
        ],
    )

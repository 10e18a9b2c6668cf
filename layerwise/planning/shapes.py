"""Sizes of a model and of a run, from which memory and time are planned."""

from dataclasses import dataclass

from layerwise.planning.workspace import Workspace
from layerwise.run.activations.streams import BATCH
from layerwise.run.capacity import STORE


@dataclass(frozen=True)
class StageShape:
    """Matrices of a block that share their inputs: their width, and the rows of each.

    `passes_through` marks a stage of one matrix whose output a module around it may return
    (:mod:`layerwise.run.activations.pass_through`).
    """

    width: int
    rows: tuple[int, ...]
    passes_through: bool = False

    @property
    def weights(self) -> int:
        """Entries of all matrices of the stage."""
        return self.width * sum(self.rows)


@dataclass(frozen=True)
class BlockShape:
    """Parameters of a block, and its pruned stages."""

    parameters: int
    stages: tuple[StageShape, ...]

    @property
    def weights(self) -> int:
        """Entries of all pruned matrices."""
        return sum(stage.weights for stage in self.stages)

    @property
    def widths(self) -> list[int]:
        """Input channels of every stage."""
        return [stage.width for stage in self.stages]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that decide the memory of a run.

    Parameters
    ----------
    blocks
        The blocks, in order.
    embeddings
        Parameters outside the blocks, without those of `head`.
    head
        Parameters of the output head that are not tied; a run does not need them.
    largest
        Entries of the largest tensor.
    hidden
        Channels between the blocks.
    itemsize
        Bytes of a parameter and of an activation.
    working
        Lengths of one sequence, ascending, and the bytes that a pass through a block needs
        at each of them besides its input.
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
        """Number of all parameters; tied ones count once."""
        return self.embeddings + self.head + sum(b.parameters for b in self.blocks)

    def working_bytes(self, length: int) -> float:
        """Bytes that a sequence needs inside a block, interpolated between the lengths."""
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
class RunShape:
    """Settings of a run that decide its memory.

    Parameters
    ----------
    n_sequences, length
        Number of calibration sequences, and their tokens.
    error_correction
        Mode, see :mod:`layerwise.run.pipeline.blocks`.
    base
        Bytes of Python, PyTorch and transformers.
    accelerator
        Whether blocks are computed on a device other than the host.
    workspace
        Workspace of the solver; None if it is unknown, and nothing is counted.
    workers
        Processes that prune blocks at the same time.
    on_disk
        Whether hidden states between the blocks are files.
    streamed
        Whether one block at a time is in memory instead of the whole model.
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
    store: int = STORE

    @property
    def tokens(self) -> int:
        """Number of all calibration tokens."""
        return self.n_sequences * self.length

    @property
    def batch(self) -> int:
        """Number of sequences of the largest batch."""
        return min(BATCH, self.n_sequences)

    @property
    def staged(self) -> bool:
        """Whether a stage sees the effect of the pruned stages before it."""
        return self.error_correction in ("block", "full")

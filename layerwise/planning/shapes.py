"""Sizes of a model and of a run, all that memory and time are planned from: no tensor."""

from dataclasses import dataclass

from layerwise.planning.workspace import Workspace
from layerwise.run.activations.dense_side import STORE
from layerwise.run.activations.streams import BATCH


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

    @property
    def widths(self) -> list[int]:
        """Input channels of every stage."""
        return [stage.width for stage in self.stages]


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
    store: int = STORE

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

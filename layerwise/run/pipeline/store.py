"""Stores for what a run has finished so far."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from layerwise.errors import DataError
from layerwise.run.pipeline.block_files import MASK
from layerwise.run.pipeline.journal import Journal
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import PrunedBlock


class States(Protocol):
    """Keeps states by name: tensors and a text."""

    def read_state(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """Return the tensors and the text of a state, or None if there is none."""
        ...

    def write_state(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Keep tensors and text under a name."""
        ...


class BlockStore(States, Protocol):
    """Keeps blocks from the time they are finished to the end of the run."""

    @property
    def blocks(self) -> Path | None:
        """Folder of the finished blocks; None if they are in memory."""
        ...

    @property
    def continued(self) -> str | None:
        """Line for the log of a run that another one began, or None."""
        ...

    def read_block(self, index: int) -> PrunedBlock | None:
        """Return a finished block, or None if there is none."""
        ...

    @property
    def run(self) -> str:
        """Key of the run, which the files of its blocks name."""
        ...

    def write_block(self, index: int, block: PrunedBlock) -> None:
        """Keep a finished block."""
        ...

    def add_file(self, index: int, name: str) -> None:
        """Keep a finished block that a worker wrote into the folder."""
        ...

    def read_tensor(self, kind: str, index: int, linear: str) -> Tensor:
        """Read one weight or mask of a finished block."""
        ...

    def write_layers(self, records: list[LayerRecord]) -> None:
        """Write the figures of all matrices so far."""
        ...

    def publish(self, write: Callable[[Journal], None]) -> None:
        """Call `write` to write the output, and give it its name."""
        ...


class StateStore(States, Protocol):
    """Keeps states of a training by name."""

    def publish(self, write: Callable[[Journal], None]) -> None:
        """Call `write` to write the output, and give it its name."""
        ...


class MemoryStore:
    """Store of a run that writes no folder."""

    blocks = None
    run = ""
    continued = None

    def __init__(self) -> None:
        self._done: dict[int, PrunedBlock] = {}

    def read_block(self, index: int) -> PrunedBlock | None:
        """Return a finished block, or None if there is none."""
        return self._done.get(index)

    def write_block(self, index: int, block: PrunedBlock) -> None:
        """Keep a finished block."""
        self._done[index] = block

    def add_file(self, index: int, name: str) -> None:
        """Do nothing: workers have a folder."""

    def read_tensor(self, kind: str, index: int, linear: str) -> Tensor:
        """Read one weight or mask of a finished block."""
        block = self._done[index]
        return (block.masks if kind == MASK else block.weights)[linear]

    def write_layers(self, records: list[LayerRecord]) -> None:
        """Do nothing: the report of the run has the figures."""

    def publish(self, write: Callable[[Journal], None]) -> None:
        """Do nothing: there is no folder."""

    def read_state(self, name: str) -> None:
        """Return None: no state outlives the process."""

    def write_state(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Do nothing: no state outlives the process."""


def finished_block(store: BlockStore, index: int) -> PrunedBlock:
    """Return a block that must have been finished.

    Raises
    ------
    DataError
        Its file is gone.
    """
    block = store.read_block(index)
    if block is None:
        message = f"{store.blocks} lost block {index}, which was finished: run again"
        raise DataError(message)
    return block

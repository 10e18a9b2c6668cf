"""Division of a run between ranks.

Every rank has a part of the calibration sequences and of the matrices of a block. The
ranks agree on everything that decides the result, and only rank 0 writes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.errors import DataError, UsageError
from layerwise.run.capacity import refuse_full_disk
from layerwise.run.data.calibration import Calibration
from layerwise.run.pipeline.block_files import BlockFolder
from layerwise.run.pipeline.destination import BLOCKS, FOLDER, Destination, partial_path
from layerwise.run.pipeline.journal import Journal
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import PrunedBlock
from layerwise.run.pipeline.store import BlockStore, MemoryStore, StateStore
from layerwise.run.workers.ranks import ALONE, Ranks


def check_shared(ranks: Ranks, refusal: str | None, *, workers: bool) -> None:
    """Refuse a run that several ranks cannot share.

    Raises
    ------
    UsageError
        The run also has workers, or there is another reason.
    """
    if not ranks.are_several:
        return
    if workers:
        message = (
            f"workers and the {ranks.size} ranks of torchrun both divide the work: leave "
            f"out --workers and --ray, or start without torchrun"
        )
        raise UsageError(message)
    if refusal is not None:
        raise UsageError(refusal)


def own_sequences(tokens: Calibration, ranks: Ranks) -> Calibration:
    """Sequences of this rank: every ``size``-th one.

    Raises
    ------
    UsageError
        There are fewer sequences than ranks.
    """
    count = len(tokens.tokens)
    if count < ranks.size:
        message = (
            f"{count} calibration sequences are fewer than the {ranks.size} ranks: raise "
            f"n_sequences, or start fewer ranks"
        )
        raise UsageError(message)
    if not ranks.are_several:
        return tokens
    return replace(tokens, tokens=tokens.tokens[ranks.rank :: ranks.size])


def agree(ranks: Ranks, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Fingerprint of a run, including the number of ranks if there are several.

    Raises
    ------
    UsageError
        The fingerprint of this rank differs from that of rank 0.
    """
    if not ranks.are_several:
        return dict(identity)
    own = json.loads(json.dumps({**identity, "ranks": ranks.size}))
    text = ranks.broadcast_text("identity", json.dumps(own) if ranks.first else None)
    other = json.loads(text)
    differs = [key for key in sorted({*own, *other}) if own.get(key) != other.get(key)]
    if differs:
        message = (
            f"rank {ranks.rank} has another {', '.join(differs)} than rank 0: start all "
            f"ranks with the same arguments, files and packages"
        )
        raise UsageError(message)
    ranks.barrier()  # nothing is written unless all agree
    return dict(own)


class Follower(BlockFolder):
    """Blocks of rank 0 as the other ranks see them: they only read.

    Parameters
    ----------
    output
        The folder that the run will become.
    run, files
        Key of the run, and the files of the blocks that were finished when the run began,
        according to rank 0.
    """

    def __init__(self, output: Path, run: str, files: Mapping[int, str]) -> None:
        super().__init__(partial_path(output) / FOLDER / BLOCKS, run, files)
        if not self.blocks.is_dir():
            message = (
                f"another rank does not see {self.blocks} of rank 0: put the output on a "
                f"file system that all ranks share"
            )
            raise DataError(message)

    def read_block(self, index: int) -> PrunedBlock | None:
        """Return a block that was finished when the run began, or None."""
        path = self.block_path(index)
        if path is not None and not path.exists():
            message = (
                f"{self.blocks} lacks block {index}, which rank 0 has: put the output on a "
                f"file system that all ranks share"
            )
            raise DataError(message)
        return super().read_block(index)

    @property
    def continued(self) -> None:
        """No line: rank 0 writes the log."""

    def write_block(self, index: int, block: PrunedBlock) -> None:
        """Do nothing: rank 0 writes."""

    def write_layers(self, records: list[LayerRecord]) -> None:
        """Do nothing: rank 0 writes."""

    def read_state(self, name: str) -> None:
        """Return None: ranks share no states."""

    def write_state(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Do nothing: rank 0 writes."""

    def publish(self, write: Callable[[Journal], None]) -> None:
        """Do nothing: rank 0 writes."""


@contextmanager
def open_store(
    destination: Destination,
    identity: Mapping[str, Any],
    ranks: Ranks = ALONE,
    needed: int = 0,
    total: int | None = None,
) -> Iterator[BlockStore]:
    """Open the store of a run; if the run fails, a folder without a block is removed.

    Parameters
    ----------
    destination
        The folder that the run will become; without one the blocks are kept in memory.
    identity
        Everything that decides the bytes of the result.
    ranks
        Rank 0 has the journal, the others read it.
    needed
        Bytes that the output will take.
    total
        Number of blocks, for people.
    """
    output = destination.output
    if output is None:
        yield MemoryStore()
        return
    if not ranks.first:
        run, files = json.loads(ranks.broadcast_text("finished", None))
        yield Follower(output, run, {int(index): name for index, name in files.items()})
        return
    with _open_journal(destination, output, identity, total) as journal:
        if ranks.are_several:
            ranks.broadcast_text("finished", json.dumps([journal.run, journal.files]))
        refuse_full_disk(journal.folder, needed)
        yield journal


@contextmanager
def open_states(
    destination: Destination, identity: Mapping[str, Any]
) -> Iterator[StateStore]:
    """Open the store of a training; a folder without a state is removed if it fails.

    Parameters
    ----------
    destination, identity
        As for :func:`open_store`.
    """
    if destination.output is None:
        yield MemoryStore()
        return
    with _open_journal(destination, destination.output, identity) as journal:
        yield journal


@contextmanager
def _open_journal(
    destination: Destination,
    output: Path,
    identity: Mapping[str, Any],
    total: int | None = None,
) -> Iterator[Journal]:
    force, resume = destination.force, destination.resume
    journal = Journal(output, identity, force=force, resume=resume, total=total)
    try:
        yield journal
    except BaseException as error:
        journal.stop(error)
        raise

"""What the ranks of a run share, and what each of them has for itself.

Every rank has a part of the calibration sequences and of the matrices of a block. They
agree on everything that decides the result, and rank 0 alone writes.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, UsageError
from layerwise.patterns import Pattern
from layerwise.run.channels.structure import Structure
from layerwise.run.data.calibration import Calibration
from layerwise.run.pipeline.gradients import required_gradient
from layerwise.run.pipeline.journal import FOLDER, Journal
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import PrunedBlock
from layerwise.run.workers.ranks import Ranks
from layerwise.solve import solver_name, steps_of
from layerwise.solver import requirements


def check_shared(
    ranks: Ranks, solver: Any, pattern: Pattern | Structure, *, workers: bool
) -> None:
    """Refuse what several ranks cannot do together.

    Raises
    ------
    UsageError
        The run has workers besides, removes channels, or needs what is not a sum over
        the sequences.
    """
    if not ranks.are_several:
        return
    if workers:
        message = (
            f"workers and the {ranks.size} ranks of torchrun both divide the work: leave "
            f"out --workers and --ray, or start without torchrun"
        )
        raise UsageError(message)
    if isinstance(pattern, Structure):
        message = (
            "a smaller model is chosen and cut as a whole, which ranks do not share: start "
            "without torchrun"
        )
        raise UsageError(message)
    if required_gradient(solver) is not None:
        message = (
            f"{solver_name(solver)} needs gradients of the whole model, which ranks do not "
            f"share: start without torchrun, or choose another method"
        )
        raise UsageError(message)
    if any("fluctuation" in requirements(step) for step in steps_of(solver)):
        message = (
            f"{solver_name(solver)} needs a statistic that depends on the order of the "
            f"sequences: start without torchrun, or choose another method"
        )
        raise UsageError(message)


def own_sequences(tokens: Calibration, ranks: Ranks) -> Calibration:
    """Sequences of this rank, every ``size``-th one.

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
    """Fingerprint of a run, the number of its ranks in it where there are several.

    Raises
    ------
    UsageError
        This rank would do something else than rank 0.
    """
    if not ranks.are_several:
        return dict(identity)
    own = json.loads(json.dumps({**identity, "ranks": ranks.size}))
    text = ranks.tell("identity", json.dumps(own) if ranks.first else None)
    other = json.loads(text)
    differs = [key for key in sorted({*own, *other}) if own.get(key) != other.get(key)]
    if differs:
        message = (
            f"rank {ranks.rank} has another {', '.join(differs)} than rank 0: start all "
            f"ranks with the same arguments, files and packages"
        )
        raise UsageError(message)
    ranks.meet()  # nothing is written unless all agree
    return dict(own)


class FollowedJournal(Journal):
    """Journal of rank 0 as the other ranks see it: they read what is there, and no more.

    Parameters
    ----------
    output
        The folder that the run will become.
    finished
        Blocks that rank 0 has found there.
    """

    def __init__(self, output: Path, finished: frozenset[int]) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self._ours = self.folder / FOLDER
        self._finished = finished
        if not self.blocks.is_dir():
            message = (
                f"{self.blocks} of rank 0 is not seen by another rank: put the output on a "
                f"file system that all ranks share"
            )
            raise DataError(message)

    def read_block(self, index: int) -> PrunedBlock | None:
        """Return a block that was finished when the run began, or None."""
        if index not in self._finished:
            return None
        block = super().read_block(index)
        if block is None:
            message = (
                f"{self.blocks} lacks block {index}, which rank 0 has: put the output on a "
                f"file system that all ranks share"
            )
            raise DataError(message)
        return block

    def write_block(self, index: int, block: PrunedBlock) -> None:
        """Leave it to rank 0."""

    def write_layers(self, records: list[LayerRecord]) -> None:
        """Leave it to rank 0."""

    def discard_if_empty(self) -> None:
        """Leave it to rank 0."""


def shared_journal(
    ranks: Ranks,
    output: Path,
    identity: Mapping[str, Any],
    *,
    force: bool,
    resume: bool,
) -> Journal:
    """Journal of rank 0, or what another rank sees of it."""
    if not ranks.are_several:
        return Journal(output, identity, force=force, resume=resume)
    if ranks.first:
        journal = Journal(output, identity, force=force, resume=resume)
        files = journal.blocks.glob("[0-9]*-*.safetensors")
        finished = sorted({int(path.name.partition("-")[0]) for path in files})
        ranks.tell("finished", json.dumps(finished))
        return journal
    finished = json.loads(ranks.tell("finished", None))
    return FollowedJournal(output, frozenset(finished))

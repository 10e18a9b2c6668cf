"""Blocks as jobs: with ``none`` and ``block`` they are independent of each other.

The driver runs the dense model, one block at a time and a few blocks ahead, and writes the
inputs of each into a file. A worker opens the checkpoint itself, prunes the block that it
is told and writes it where the journal of the run finds it. All that decides the result is
on the disk or was decided before, so a block may be done twice, anywhere.
"""

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.errors import DataError, UsageError
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.hidden_store import HiddenStore
from layerwise.run.activations.streams import BATCH, capture, evaluation_mode
from layerwise.run.checkpoints.shard import write_shard
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.calibration import Calibration
from layerwise.run.models.architecture import adapter_in
from layerwise.run.models.residency import Residency, open_resident
from layerwise.run.pipeline.blocks import advance
from layerwise.run.pipeline.journal import Journal, write_block
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.targets import Selection
from layerwise.run.pipeline.task import Task
from layerwise.run.stopwatch import timed
from layerwise.run.workers.executor import Executor, Job
from layerwise.run.workers.messages import Opening, Place
from layerwise.run.workers.processes import local_workers
from layerwise.run.workers.schedule import run_jobs

INDEPENDENT = ("none", "block")


@dataclass(frozen=True)
class Workers:
    """Who prunes the blocks.

    Parameters
    ----------
    count
        Workers; 1 without Ray is this process itself.
    ray
        Address of a Ray cluster, ``"local"`` for one of this machine; None: processes.
    """

    count: int = 1
    ray: str | None = None

    @property
    def are_others(self) -> bool:
        """Whether any work leaves this process."""
        return self.count > 1 or self.ray is not None

    def check(self, error_correction: str, *, streamable: bool) -> None:
        """Refuse what cannot be split into jobs."""
        if self.count < 1:
            message = f"workers must be at least 1, got {self.count}"
            raise UsageError(message)
        if self.are_others and error_correction not in INDEPENDENT:
            message = (
                f"with error_correction {error_correction!r} a block waits for the one "
                f"before it: use {' or '.join(INDEPENDENT)}, or one worker"
            )
            raise UsageError(message)
        if self.are_others and not streamable:
            message = (
                "workers take one block at a time from a checkpoint folder: give a path "
                "and an output_dir, and a method that removes no channels and needs no "
                "gradients; or use one worker"
            )
            raise UsageError(message)

    def executor(self, opening: Opening, device: torch.device) -> Executor:
        """Start nothing yet; workers come with the first jobs."""
        threads = torch.get_num_threads()
        try:
            pickle.dumps(opening)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            message = f"the method cannot be sent to workers ({error}); use one worker"
            raise UsageError(message) from error
        if self.ray is not None:
            from layerwise.run.workers.ray_cluster import ray_workers

            return ray_workers(opening, self.count, address=self.ray, threads=threads)
        name = "auto" if device == torch.device("cuda") else str(device)
        return local_workers(opening, self.count, threads=threads, device=name)


@dataclass(frozen=True)
class BlockWork:
    """All that a worker needs to know of a run besides the block.

    Parameters
    ----------
    source
        Checkpoint folder.
    task
        What to do; its device is chosen by the place of the worker.
    targets, ignore
        Entries of the selection.
    tokens
        Token windows, shape (sequences, length).
    folder
        Where inputs are read and blocks are written.
    """

    source: Path
    task: Task
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    tokens: Tensor
    folder: Path


def open_blocks(work: BlockWork, place: Place) -> Callable[[int], None]:
    """Open the checkpoint in a worker; what is returned prunes a block by its number."""
    residency = open_resident(Checkpoint.open(work.source), streamed=True, trusted=True)
    model = residency.model
    adapter = adapter_in(residency)
    pattern = work.task.pattern
    selection = Selection(model, adapter, work.targets, work.ignore, pattern)  # type: ignore[arg-type]
    task = replace(work.task, adapter=adapter, device=torch.device(place.device))
    blocks = list(selection.blocks.items())
    with evaluation_mode(model), residency.entrance(blocks[0][1]):
        batches = torch.split(work.tokens, BATCH)
        calls = capture(model, [block for _, block in blocks], batches).calls

    @torch.no_grad()
    def prune(index: int) -> None:
        name, block = blocks[index]
        hidden = read_hidden(work.folder, index)
        stages = selection.stages_of(name)
        inputs = BlockInputs(name, block, stages, calls[index], hidden, hidden)
        with evaluation_mode(model), residency.block(block, task.device):
            write_block(work.folder, index, task.prune(inputs))

    return prune


@dataclass(frozen=True, eq=False)
class ParallelRun:
    """The driver of a run whose blocks are pruned by workers.

    Parameters
    ----------
    residency, selection, task, tokens, journal, store
        As for :func:`layerwise.run.pipeline.walk.walk`.
    source
        Checkpoint folder, which every worker opens.
    """

    residency: Residency
    selection: Selection
    task: Task
    tokens: Calibration
    journal: Journal
    store: HiddenStore
    source: Path

    @torch.no_grad()
    def walk(
        self, workers: Workers, on_layer: OnLayer, on_note: Callable[[str], None]
    ) -> list[PrunedBlock]:
        """Prune all blocks, in any order."""
        done: dict[int, PrunedBlock] = {}

        def finish(index: int) -> None:
            result = self.journal.read_block(index)
            assert result is not None
            done[index] = result.without_tensors()
            in_order = [record for i in sorted(done) for record in done[i].records]
            self.journal.write_layers(in_order)
            hidden_path(self.journal.blocks, index).unlink(missing_ok=True)
            for record in result.records:
                on_layer(record)

        run_jobs(
            self._jobs(finish),
            workers.executor(partial(open_blocks, self._work()), self.task.device),
            on_done=lambda job, _: finish(int(job.key)),
            on_note=on_note,
        )
        return [done[index] for index in sorted(done)]

    def _jobs(self, finish: Callable[[int], None]) -> Iterator[Job]:
        """Blocks that are not done, each when its inputs are on the disk."""
        blocks = list(self.selection.blocks.items())
        modules = [block for _, block in blocks]
        with timed("capture"), self.residency.entrance(modules[0]):
            batches = torch.split(self.tokens.tokens, BATCH)
            stream = capture(self.residency.model, modules, batches)
        hidden = self.store.keep(stream.hidden)
        stream.hidden.clear()
        for index, (name, block) in enumerate(blocks):
            if self.journal.block_path(index) is None:
                with timed("write"):
                    write_hidden(self.journal.blocks, index, hidden)
                yield Job(index, index)
            else:
                finish(index)
            if index < len(blocks) - 1:
                inputs = BlockInputs(name, block, (), stream.calls[index], hidden, hidden)
                with self.residency.block(block, self.task.device):
                    hidden = self.store.keep(advance(self.task, inputs, hidden))

    def _work(self) -> BlockWork:
        return BlockWork(
            self.source.absolute(),
            replace(self.task, device=torch.device("cpu")),
            tuple(self.selection.targets),
            tuple(self.selection.ignore),
            self.tokens.tokens,
            self.journal.blocks.absolute(),
        )


def hidden_path(folder: Path, index: int) -> Path:
    """File with the inputs of a block."""
    return folder / f"inputs-{index:05d}.safetensors"


def write_hidden(folder: Path, index: int, hidden: Sequence[Tensor]) -> None:
    """Store the inputs of a block, batch by batch."""
    batches = {f"{number:06d}": batch for number, batch in enumerate(hidden)}
    like = {name: (batch.dtype, batch.shape) for name, batch in batches.items()}
    write_shard(hidden_path(folder, index), like, batches.__getitem__, {})


def read_hidden(folder: Path, index: int) -> list[Tensor]:
    """Inputs of a block; they are mapped into memory and read when they are used."""
    path = hidden_path(folder, index)
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in sorted(file.keys())]
    except (SafetensorError, OSError) as error:
        message = f"cannot read {path}: {error}; start the run again"
        raise DataError(message) from error

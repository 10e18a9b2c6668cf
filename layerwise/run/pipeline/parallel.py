"""Blocks as jobs: with ``none`` and ``block`` they are independent of each other.

The driver runs the dense model, one block at a time and a few blocks ahead, and writes the
inputs of each block into a file. A worker opens the checkpoint itself, prunes its block and
writes it into the journal of the run. The result depends only on files and on settings
resolved before, so a block may be pruned twice, by any worker.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.errors import DataError, UsageError
from layerwise.limits import MOST_WORKERS, check_limit
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.hidden_store import HiddenStore
from layerwise.run.activations.streams import BATCH, capture, evaluation_mode
from layerwise.run.checkpoints.shard import write_shard
from layerwise.run.models.opening import open_model
from layerwise.run.pipeline.block_checks import stored_block
from layerwise.run.pipeline.block_files import INPUTS, write_block
from layerwise.run.pipeline.blocks import advance
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.removal import BlockStep, Removal, Run
from layerwise.run.pipeline.store import BlockStore, finished_block
from layerwise.run.pipeline.task import ErrorCorrection, task_of
from layerwise.run.pipeline.walk import walk
from layerwise.run.stopwatch import timed
from layerwise.run.workers.executor import Executor, Job
from layerwise.run.workers.messages import Opening, WorkerSpec
from layerwise.run.workers.processes import local_workers
from layerwise.run.workers.schedule import run_jobs

INDEPENDENT = ("none", "block")


class Progress(Protocol):
    """Receives the progress of the work."""

    def on_layer(self, record: LayerRecord) -> None:
        """One matrix is done."""
        ...

    def on_note(self, text: str) -> None:
        """A worker is lost or slow."""
        ...


@dataclass(frozen=True)
class Workers:
    """Processes that prune the blocks.

    Parameters
    ----------
    count
        Number of workers; 1 without Ray is this process itself.
    ray
        Address of a Ray cluster, ``"local"`` for one on this machine; None: processes.
    """

    count: int = 1
    ray: str | None = None

    @property
    def are_others(self) -> bool:
        """Whether other processes prune the blocks."""
        return self.count > 1 or self.ray is not None

    def check(self, error_correction: str, *, streamable: bool) -> None:
        """Refuse a run that cannot be split into jobs."""
        if self.count < 1:
            message = f"workers must be at least 1, got {self.count}"
            raise UsageError(message)
        check_limit("workers", self.count, MOST_WORKERS)
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

    def prune(
        self,
        run: Run[Any],
        removal: Removal[Any],
        step: BlockStep,
        store: BlockStore,
        hidden: HiddenStore,
        listeners: Progress,
    ) -> list[LayerRecord]:
        """Prune all blocks, in this process or in workers."""
        source, folder = run.opened.source, store.blocks
        if not self.are_others or source is None or folder is None:
            return walk(run, step, store, hidden, listeners.on_layer)
        parallel = ParallelRun(run, removal, step, store, hidden, source.path, folder)
        return parallel.walk(self, listeners)

    def executor(self, opening: Opening, device: torch.device) -> Executor:
        """Create the executor; workers start with the first jobs."""
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
    """Everything that a worker needs to know about a run besides the block.

    Parameters
    ----------
    source
        Checkpoint folder.
    removal, targets, ignore
        What is removed, and the entries of the selection.
    step
        The step that prunes a block.
    error_correction
        ``"none"`` or ``"block"``.
    tokens
        Token windows, shape (sequences, length).
    folder
        Folder from which inputs are read and into which blocks are written.
    run
        Key of the run, for the files of the blocks.
    """

    source: Path
    removal: Removal[Any]
    step: BlockStep
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    error_correction: ErrorCorrection
    tokens: Tensor
    folder: Path
    run: str


def open_blocks(work: BlockWork, spec: WorkerSpec) -> Callable[[int], str]:
    """Open the checkpoint in a worker; return a function that prunes a block by number.

    The function returns the name of the file that it wrote.
    """
    opened = open_model(work.source, streamed=True, trusted=True)
    model, residency = opened.model, opened.residency
    selection = work.removal.select(opened, work.targets, work.ignore)
    device = torch.device(spec.device)
    task = task_of(work.removal.method, opened.adapter, work.error_correction, device)
    blocks = list(selection.blocks.items())
    with evaluation_mode(model), residency.entrance(blocks[0][1]):
        batches = torch.split(work.tokens, BATCH)
        calls = capture(model, [block for _, block in blocks], batches).calls

    @torch.no_grad()
    def prune(index: int) -> str:
        name, block = blocks[index]
        hidden = read_hidden(work.folder, index)
        stages = selection.stages_of(name)
        inputs = BlockInputs(
            name,
            block,
            stages,
            calls[index],
            hidden,
            hidden,
            stored=opened.stored_weights,
        )
        with evaluation_mode(model), residency.block(block, task.device):
            block = work.step.prune_block(task, inputs)
            return write_block(work.folder, index, block, work.run)

    return prune


@dataclass(frozen=True, eq=False)
class ParallelRun:
    """The driver of a run whose blocks are pruned by workers.

    Parameters
    ----------
    run, step, store, hidden
        As for :func:`layerwise.run.pipeline.walk.walk`.
    removal
        What is removed; every worker makes its selection from it.
    source, folder
        Checkpoint folder, opened by every worker, and the folder of finished blocks.
    """

    run: Run[Any]
    removal: Removal[Any]
    step: BlockStep
    store: BlockStore
    hidden: HiddenStore
    source: Path
    folder: Path

    @torch.no_grad()
    def walk(self, workers: Workers, listeners: Progress) -> list[LayerRecord]:
        """Prune all blocks, in any order; return the records in the order of the model."""
        done: dict[int, list[LayerRecord]] = {}

        def finish(index: int) -> None:
            result = finished_block(self.store, index)
            done[index] = result.records
            self.store.write_layers(_in_order(done))
            hidden_path(self.folder, index).unlink(missing_ok=True)
            for record in result.records:
                listeners.on_layer(record)

        def add(job: Job, name: str) -> None:
            self.store.add_file(int(job.key), name)
            finish(int(job.key))

        count = min(workers.count, len(self.run.selection.blocks))
        workers = replace(workers, count=count)
        opening = partial(open_blocks, self._work())
        run_jobs(
            self._jobs(finish),
            workers.executor(opening, self.run.task.device),
            on_done=add,
            on_note=listeners.on_note,
        )
        return _in_order(done)

    def _jobs(self, finish: Callable[[int], None]) -> Iterator[Job]:
        """Unfinished blocks, each as soon as its inputs are on the disk."""
        task, residency = self.run.task, self.run.opened.residency
        blocks = list(self.run.selection.blocks.items())
        modules = [block for _, block in blocks]
        with timed("capture"), residency.entrance(modules[0]):
            batches = torch.split(self.run.tokens.tokens, BATCH)
            stream = capture(residency.model, modules, batches)
        hidden = self.hidden.keep(stream.hidden)
        stream.hidden.clear()
        for index, (name, block) in enumerate(blocks):
            stages = self.run.selection.stages_of(name)
            inputs = BlockInputs(name, block, stages, stream.calls[index], hidden, hidden)
            pruned = self.step.stages_of(inputs)
            if stored_block(self.store, index, task.adapter, inputs, pruned) is None:
                with timed("write"):
                    write_hidden(self.folder, index, hidden)
                yield Job(index, index)
            else:
                finish(index)
            if index < len(blocks) - 1:
                with residency.block(block, task.device):
                    hidden = self.hidden.keep(advance(task, inputs, hidden))

    def _work(self) -> BlockWork:
        selection = self.run.selection
        return BlockWork(
            self.source.absolute(),
            self.removal,
            self.step,
            tuple(selection.targets),
            tuple(selection.ignore),
            self.run.task.error_correction,
            self.run.tokens.tokens,
            self.folder.absolute(),
            self.store.run,
        )


def _in_order(done: Mapping[int, list[LayerRecord]]) -> list[LayerRecord]:
    return [record for index in sorted(done) for record in done[index]]


def hidden_path(folder: Path, index: int) -> Path:
    """File with the inputs of a block."""
    return folder / f"{INPUTS}{index:05d}.safetensors"


def write_hidden(folder: Path, index: int, hidden: Sequence[Tensor]) -> None:
    """Store the inputs of a block, batch by batch."""
    batches = {f"{number:06d}": batch for number, batch in enumerate(hidden)}
    like = {name: (batch.dtype, batch.shape) for name, batch in batches.items()}
    write_shard(hidden_path(folder, index), like, batches.__getitem__, {})


def read_hidden(folder: Path, index: int) -> list[Tensor]:
    """Inputs of a block, mapped into memory and read when they are used."""
    path = hidden_path(folder, index)
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_tensor(name) for name in sorted(file.keys())]
    except (SafetensorError, OSError) as error:
        message = f"cannot read {path}: {error}; start the run again"
        raise DataError(message) from error

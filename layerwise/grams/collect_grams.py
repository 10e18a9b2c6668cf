"""Calibrate once: the moments of every layer of a dense model, written to a gram folder.

It takes one pass through the model, without error correction. Every problem is posed by
dense inputs, so no answer changes another problem. All problems can be solved later, in any
order and any number of times (:mod:`layerwise.grams.solve_grams`).
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.adapters.base import Stage
from layerwise.errors import UnsupportedModelError
from layerwise.grams.gram_folder import GramManifest, StageFile, StoredMatrix
from layerwise.grams.layer_files import write_file
from layerwise.modes import in_ordinary_mode
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.hidden_store import hidden_store
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.checkpoints.hashes import file_sha256
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.accounts import checkpoint_names
from layerwise.run.models.opening import open_model
from layerwise.run.outputs.output import fingerprint, versions
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.blocks import collect_at_once
from layerwise.run.pipeline.destination import FOLDER, Destination, partial_path
from layerwise.run.pipeline.expected import expected_work
from layerwise.run.pipeline.matrix import naming
from layerwise.run.pipeline.removal import Run
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.sharing import open_store
from layerwise.run.pipeline.targets import Selection
from layerwise.run.pipeline.task import Task
from layerwise.run.pipeline.walk import walk
from layerwise.run.remaining import Remaining
from layerwise.run.settings import CalibrationData, as_entries, choose_device
from layerwise.run.steps import listening, status
from layerwise.run.stopwatch import timed

OnStage = Callable[[str, int], None]  # gets the first layer and the number of inputs
# all statistics that a forward pass can collect, for any later solver
STATISTICS = frozenset({"gram", "mean", "fluctuation"})


@dataclass(frozen=True)
class CollectGrams:
    """Step that writes the moments of a block to files and does not change the block.

    Parameters
    ----------
    folder
        Folder of the files.
    blocks
        Full names of all blocks, in order.
    on_stage
        Called after every file.
    """

    folder: Path
    blocks: Sequence[str]
    on_stage: OnStage = lambda name, width: None

    def stages_of(self, inputs: BlockInputs) -> tuple[Stage, ...]:
        """Return no stages: nothing is pruned."""
        return ()

    def prune_block(
        self,
        task: Task,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        dense: DenseSide | None = None,
    ) -> PrunedBlock:
        """Write one file per stage; prune nothing."""
        accumulators = collect_at_once(task, inputs)
        index = self.blocks.index(inputs.name)
        for number, stage in enumerate(inputs.stages):
            weights = {
                f"{inputs.name}.{name}": inputs.weight(task.adapter, name)
                for name in stage.linears
            }
            with naming(next(iter(weights))):
                moments = accumulators.pop(0).moments()
            with timed("write"):
                write_file(self.folder / stage_file(index, number), moments, weights)
            self.on_stage(next(iter(weights)), moments.width)
        return PrunedBlock()


def stage_file(block: int, stage: int) -> str:
    """File name of a stage; the order of the names is that of the data flow."""
    return f"{block:05d}-{stage:02d}.safetensors"


@in_ordinary_mode
def collect_grams(
    model: str | Path,
    output_dir: str | Path,
    *,
    calibration: Any,
    tokenizer: Any = None,
    n_sequences: int = 128,
    sequence_length: int | None = None,
    targets: str | Sequence[str] = "Linear",
    ignore: str | Sequence[str] = ("lm_head",),
    seed: int = 0,
    bos: str = "auto",
    device: str | torch.device = "auto",
    resume: bool = True,
    force: bool = False,
    on_note: Callable[[str], None] = lambda note: None,
    on_start: Callable[[int], None] = lambda n_stages: None,
    on_stage: OnStage = lambda name, width: None,
    on_left: Callable[[float], None] = lambda seconds: None,
    on_status: Callable[[str], None] = lambda text: None,
) -> GramManifest:
    """Write the moments and weights of all linear layers of a dense model.

    Parameters
    ----------
    model
        Checkpoint folder or hub name.
    output_dir
        New folder; work happens in ``output_dir.partial``.
    calibration, tokenizer, n_sequences, sequence_length, seed, bos
        As in :func:`layerwise.prune_model`.
    targets, ignore, device
        As in :func:`layerwise.prune_model`.
    resume
        Continue an unfinished run with the same arguments in the same folder.
    force
        Replace a finished `output_dir`.
    on_note
        Called with remarks for the log, such as that a run is continued.
    on_start
        Called with the number of files.
    on_stage
        Called after every file with its first layer and its number of inputs.
    on_left
        Called before `on_stage` with the expected seconds to the end.
    on_status
        Called with what is done now.

    Returns
    -------
    GramManifest
        The manifest of the folder.

    Raises
    ------
    UsageError, UnsupportedModelError
        If an argument is impossible; nothing was written.
    DataError
        If the text or checkpoint is missing or damaged, or the disk is full.

    Notes
    -----
    The folder needs ``8 in^2`` bytes per stage, and the bytes of the weights. The grams of
    one block are in memory at a time.
    """
    inputs = model, calibration
    destination = Destination.of(output_dir, resume=resume, force=force, inputs=inputs)
    output = Path(destination.output or output_dir)
    with destination.held(), listening(on_status):
        data = CalibrationData(calibration, n_sequences, sequence_length, seed, bos)
        status(f"opening {model}")
        with timed("load"):
            source = Checkpoint.open(model)
            opened = open_model(source, streamed=True)
        selection = Selection(
            opened.model, opened.adapter, as_entries(targets), as_entries(ignore)
        )
        tokens = data.windows(opened, tokenizer)
        task = Task(opened.adapter, "none", choose_device(device), STATISTICS)
        run = Run(opened, selection, task, tokens, tokens, output)
        recipe = Recipe(
            **data.recipe_fields(tokens),
            model=str(source.path),
            error_correction="none",
            targets=list(selection.targets),
            ignore=list(selection.ignore),
        )
        stages = _stages(opened.model, selection, checkpoint_names(opened.model, source))
        with timed("hash"):
            identity = fingerprint(recipe, run) | {"method": "calibrate"}
        total = len(selection.blocks)
        with open_store(destination, identity, total=total) as store:
            for text in filter(None, (store.continued, *tokens.notes)):
                on_note(text)
            on_start(len(stages))
            stored = _with_time_left(run, stages, on_stage, on_left)
            step = CollectGrams(partial_path(output), list(selection.blocks), stored)
            with evaluation_mode(opened.model):
                sizes = tokens.tokens.numel(), task.error_correction
                hidden = hidden_store("auto", store.blocks, opened.model, *sizes)
                walk(run, step, store, hidden, lambda record: None)
            manifest = _manifest(run, recipe, identity, stages, partial_path(output))
            store.publish(lambda journal: manifest.write(journal.folder))
        shutil.rmtree(output / FOLDER)  # only a resumed run needs it
    return manifest


def _with_time_left(
    run: Run[Selection],
    stages: Mapping[str, Mapping[str, StoredMatrix]],
    on_stage: OnStage,
    on_left: Callable[[float], None],
) -> OnStage:
    """Callback that says the expected time to the end before it passes on a stage."""
    work = expected_work(run)
    remaining = Remaining({name: work[name] for name in map(_first, stages.values())})

    def stored(name: str, width: int) -> None:
        if (left := remaining.after(name)) is not None:
            on_left(left)
        on_stage(name, width)

    return stored


def _first(layers: Mapping[str, StoredMatrix]) -> str:
    return next(iter(layers))


def _manifest(
    run: Run[Selection],
    recipe: Recipe,
    identity: Mapping[str, Any],
    stages: Mapping[str, Mapping[str, StoredMatrix]],
    folder: Path,
) -> GramManifest:
    """Manifest of the finished folder."""
    return GramManifest(
        format=1,
        recipe=recipe,
        model_type=str(run.opened.model.config.model_type),
        source=identity["weights"],
        calibration=run.tokens.source,
        calibration_sha256=run.tokens.sha256,
        versions=versions(),
        files={
            name: StageFile(sha256=file_sha256(folder / name), layers=dict(layers))
            for name, layers in stages.items()
        },
    )


def _stages(
    model: nn.Module, selection: Selection, stored: Mapping[str, str]
) -> dict[str, dict[str, StoredMatrix]]:
    """Layers of every file that will be written, by file name."""
    files = {}
    for index, block in enumerate(selection.blocks):
        for number, stage in enumerate(selection.stages_of(block)):
            names = [f"{block}.{linear}" for linear in stage.linears]
            files[stage_file(index, number)] = {
                name: _describe(model, selection, stored, name) for name in names
            }
    return files


def _describe(
    model: nn.Module, selection: Selection, stored: Mapping[str, str], name: str
) -> StoredMatrix:
    parameter = f"{name}.weight"
    if parameter not in stored:
        message = f"{name}: the checkpoint has no tensor {parameter}; add it to ignore"
        raise UnsupportedModelError(message)
    weight, transposed = model.get_parameter(parameter), name in selection.transposed
    rows, width = weight.T.shape if transposed else weight.shape
    return StoredMatrix(
        shape=(rows, width), tensor=stored[parameter], transposed=transposed
    )

"""Calibrate once: the moments of every layer of a dense model, written to a gram folder.

One pass through the model, without error correction: every problem is posed by the dense
inputs alone, so no answer changes another problem and all of them can be solved later, in
any order and as often as one likes (:mod:`layerwise.grams.solve_grams`).
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from layerwise.errors import UnsupportedModelError
from layerwise.grams.gram_folder import GramManifest, StageFile, StoredMatrix
from layerwise.grams.layer_files import write_file
from layerwise.patterns import Unstructured
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.hidden_store import hidden_store
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.checkpoints.hashes import file_sha256
from layerwise.run.checkpoints.storage import Checkpoint, checkpoint_names
from layerwise.run.data.calibration import token_windows
from layerwise.run.models.architecture import adapter_in, embedding_rows
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.residency import open_resident
from layerwise.run.outputs.output import fingerprint, versions
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.blocks import collect_at_once
from layerwise.run.pipeline.journal import FOLDER, Journal, check_output
from layerwise.run.pipeline.matrix import naming
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.targets import Selection
from layerwise.run.pipeline.task import Task
from layerwise.run.pipeline.walk import walk
from layerwise.run.settings import as_entries, choose_device, choose_sequence_length
from layerwise.run.stopwatch import timed

OnStage = Callable[[str, int], None]  # told the first layer and the number of inputs


@dataclass(frozen=True)
class AllStatistics:
    """Stands in for the solvers to come: asks for all that one forward pass can tell."""

    name: ClassVar[str] = "calibrate"
    requires: ClassVar[frozenset[str]] = frozenset({"gram", "mean", "fluctuation"})


@dataclass(frozen=True)
class GramTask(Task):
    """A task that writes the moments of a block to files and leaves the block as it is."""

    folder: Path = Path()
    blocks: Sequence[str] = ()  # names of all blocks, in order
    on_stage: OnStage = field(default=lambda name, width: None, compare=False)

    def prune(
        self,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        side: DenseSide | None = None,
    ) -> PrunedBlock:
        """Write one file per stage; nothing is pruned."""
        accumulators = collect_at_once(self, inputs)
        index = self.blocks.index(inputs.name)
        for number, stage in enumerate(inputs.stages):
            weights = {
                f"{inputs.name}.{name}": self.adapter.weight(inputs.block, name)
                for name in stage.linears
            }
            with naming(next(iter(weights))):
                moments = accumulators.pop(0).moments()
            with timed("write"):
                write_file(self.folder / stage_file(index, number), moments, weights)
            self.on_stage(next(iter(weights)), moments.width)
        return PrunedBlock()


class GramJournal(Journal):
    """A journal whose blocks are marks: what they stand for is in the files of the folder.

    Nothing of the journal stays in a finished gram folder.
    """

    def write_layers(self, records: list[LayerRecord]) -> None:
        """Nothing is solved yet, so there are no figures."""

    def finish(self) -> None:
        """Rename the partial folder and drop what only a resumed run would need."""
        super().finish()
        shutil.rmtree(self.output / FOLDER)


def stage_file(block: int, stage: int) -> str:
    """File name of a stage; the order of the names is that of the data flow."""
    return f"{block:05d}-{stage:02d}.safetensors"


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
    device: str | torch.device = "auto",
    resume: bool = True,
    force: bool = False,
    on_start: Callable[[int], None] = lambda n_stages: None,
    on_stage: OnStage = lambda name, width: None,
) -> GramManifest:
    """Write the moments and weights of all linear layers of a dense model.

    Parameters
    ----------
    model
        Checkpoint folder or hub name.
    output_dir
        New folder; work happens in ``output_dir.partial``.
    calibration, tokenizer, n_sequences, sequence_length, targets, ignore, seed, device
        As in :func:`layerwise.prune_model`.
    resume
        Continue an unfinished run with the same arguments in the same folder.
    force
        Replace a finished `output_dir`.
    on_start
        Told the number of files.
    on_stage
        Told the first layer and the number of inputs of every file that is written.

    Returns
    -------
    GramManifest
        What the folder holds.

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
    output = Path(output_dir)
    check_output(output, force=force)
    with timed("load"):
        source = Checkpoint.open(model)
        residency = open_resident(source, streamed=True)
        network = residency.model
        adapter = adapter_in(residency)
    selection = Selection(
        network, adapter, as_entries(targets), as_entries(ignore), Unstructured(0.0)
    )
    stages = _stages(network, selection, checkpoint_names(network, source))
    tokens = token_windows(
        calibration,
        tokenizer or load_tokenizer(source),
        n_sequences=n_sequences,
        sequence_length=choose_sequence_length(network, sequence_length),
        seed=seed,
        vocab_size=embedding_rows(network),
    )
    named = isinstance(calibration, str | Path)
    recipe = Recipe(
        model=str(source.path),
        calibration=str(calibration) if named else tokens.source,
        n_sequences=tokens.tokens.shape[0],
        sequence_length=tokens.tokens.shape[1],
        error_correction="none",
        targets=list(selection.targets),
        ignore=list(selection.ignore),
        seed=seed,
    )
    chosen = choose_device(device)
    with timed("hash"):
        identity = fingerprint(recipe, tokens, source, network, chosen)
    journal = GramJournal(
        output, identity | {"method": "calibrate"}, force=force, resume=resume
    )
    names = list(selection.blocks)
    task = GramTask(
        adapter,
        AllStatistics(),
        Unstructured(0.0),
        0.0,
        "none",
        chosen,
        folder=journal.folder,
        blocks=names,
        on_stage=on_stage,
    )
    on_start(len(stages))
    try:
        with evaluation_mode(network):
            store = hidden_store("auto", journal.blocks, network, tokens, task)
            walk(residency, selection, task, tokens, journal, lambda record: None, store)
    except BaseException:
        journal.discard_if_empty()
        raise
    manifest = GramManifest(
        format=1,
        recipe=recipe,
        model_type=str(network.config.model_type),
        source=identity["weights"],
        calibration=tokens.source,
        calibration_sha256=tokens.sha256,
        versions=versions(),
        files={
            name: StageFile(sha256=file_sha256(journal.folder / name), layers=layers)
            for name, layers in stages.items()
        },
    )
    manifest.write(journal.folder)
    journal.finish()
    return manifest


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

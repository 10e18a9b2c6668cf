"""What ``layerwise solve --output`` writes: pruned weights, or a pruned checkpoint.

Work happens in ``OUT.partial`` with a journal of one block per layer, so a run that was
stopped continues behind its last finished layer. Without a model the folder holds the
weights in the files of the gram folder, by the name of the layer; with it, everything that
a prune without error correction would have written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import DataError
from layerwise.patterns import NM, Pattern
from layerwise.run.atomic import atomic_write
from layerwise.run.calibration import Calibration
from layerwise.run.gram_folder import MANIFEST, GramManifest, StageFile, file_sha256
from layerwise.run.journal import BLOCKS, FOLDER, Journal
from layerwise.run.output import Outcome, tensor_hashes, versions, write_rest
from layerwise.run.recipe import Recipe, options_of
from layerwise.run.records import LayerRecord
from layerwise.run.storage import Checkpoint, write_checkpoint
from layerwise.solve import solver_name


def recipe_of(
    manifest: GramManifest,
    solver: object,
    pattern: Pattern,
    damping: float,
    certify: bool | None,
) -> Recipe:
    """Arguments of the prune that gives the same weights."""
    sparsity = (
        str(pattern) if isinstance(pattern, NM) else getattr(pattern, "sparsity", None)
    )
    asked = {
        "method": solver_name(solver),
        "sparsity": sparsity,
        "group": getattr(pattern, "group", "row"),
        "damping": damping,
        "certify": certify,
        "options": options_of(solver),
    }
    return manifest.recipe.model_copy(update=asked)


class SolvedFolder:
    """The output of one method at one pattern, from its first layer to its last.

    Parameters
    ----------
    output
        The folder that will be there at the end.
    grams, manifest
        The gram folder.
    recipe
        Of the prune that gives the same weights.
    model
        The checkpoint to copy, or None.
    machine
        What of the machine decides the bytes: kind of device, threads.
    resume, force
        Whether to continue a partial folder, and to replace a finished one.

    Raises
    ------
    DataError
        The checkpoint is damaged, or not the one that was calibrated.
    UsageError
        The output exists, or is an unfinished run with other arguments.
    """

    def __init__(
        self,
        output: Path,
        grams: Path,
        manifest: GramManifest,
        recipe: Recipe,
        model: str | Path | None,
        machine: Mapping[str, Any],
        *,
        resume: bool,
        force: bool,
    ) -> None:
        self._manifest = manifest
        self._source = None if model is None else _calibrated(model, manifest)
        if self._source is not None:
            recipe = recipe.model_copy(update={"model": str(self._source.path)})
        self._recipe = recipe
        identity = {
            **recipe.model_dump(mode="json", exclude={"model"}),
            "grams": file_sha256(grams / MANIFEST),
            "checkpoint": model is not None,
            "versions": versions(),
            **machine,
        }
        self.journal = Journal(output, identity, force=force, resume=resume)
        self._index = {name: i for i, (_, name, _) in enumerate(manifest.layers())}

    def target(self, name: str) -> Path:
        """File for the result of a layer, a block of the journal."""
        folder = self.journal.folder / FOLDER / BLOCKS
        return folder / f"{self._index[name]:05d}.safetensors"

    def finished(self, name: str) -> LayerRecord | None:
        """Figures of a layer that is done, or None."""
        block = self.journal.read_block(self._index[name])
        return None if block is None else block.records[0]

    def finish(self) -> None:
        """Write the folder and give it its name."""
        if self._source is None:
            self._write_weights()
        else:
            self._write_checkpoint(self._source)
        self.journal.finish()

    def _read(self, name: str) -> tuple[Tensor, Tensor, LayerRecord]:
        block = self.journal.read_block(self._index[name])
        if block is None or name not in block.weights:
            message = f"{self.target(name)} does not hold {name}; run the command again"
            raise DataError(message)
        return block.weights[name], block.masks[name], block.records[0]

    def _write_weights(self) -> None:
        """Files like those of the gram folder, matrices (out, in)."""
        masks: dict[str, Tensor] = {}
        records: list[LayerRecord] = []
        for file, stage in self._manifest.files.items():
            weights = self._collect(stage, masks, records)
            atomic_write(self.journal.folder / file, save(weights))
        self.journal.write_masks(masks)
        self.journal.write_layers(records)
        recipe = self._recipe.to_yaml().encode()
        atomic_write(self.journal.folder / "recipe.yaml", recipe)

    def _collect(
        self, stage: StageFile, masks: dict[str, Tensor], records: list[LayerRecord]
    ) -> dict[str, Tensor]:
        """Weights of a stage by parameter; masks and records join those of the others."""
        weights = {}
        for name in stage.layers:
            weight, mask, record = self._read(name)
            weights[f"{name}.weight"], masks[f"{name}.weight"] = weight, mask
            records.append(record)
        return weights

    def _write_checkpoint(self, source: Checkpoint) -> None:
        """The source with the pruned tensors, as they are stored there."""
        manifest, folder = self._manifest, self.journal.folder
        stored: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        records: list[LayerRecord] = []
        pruned: dict[str, str] = {}
        for _, name, layer in manifest.layers():
            weight, mask, record = self._read(name)
            if layer.transposed:
                weight, mask = weight.T.contiguous(), mask.T.contiguous()
            stored[layer.tensor] = weight
            masks[f"{name}.weight"] = mask
            pruned[f"{name}.weight"] = layer.tensor
            records.append(record)
        write_checkpoint(source, folder, stored, overwrite=True)
        self.journal.write_masks(masks)
        nothing = torch.empty(0, dtype=torch.int64)  # the windows themselves are not stored
        tokens = Calibration(nothing, manifest.calibration, manifest.calibration_sha256)
        write_rest(
            self.journal,
            Outcome(self._recipe, tokens, records, source, None),
            source,
            pruned=pruned,
            transposed=[f"{n}.weight" for _, n, one in manifest.layers() if one.transposed],
            untouched=tensor_hashes(source, set(source.weight_map) - set(pruned.values())),
        )


def _calibrated(model: str | Path, manifest: GramManifest) -> Checkpoint:
    """The checkpoint, if its weights are those that were calibrated."""
    source = Checkpoint.open(model)
    found = source.sha256()
    for name in sorted({*manifest.source, *found}):
        weights = name.endswith(".safetensors") or name == "config.json"
        if weights and manifest.source.get(name) != found.get(name):
            message = f"{source.path} is not the model that was calibrated: {name} differs"
            raise DataError(message)
    return source

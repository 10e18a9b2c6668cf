"""The output of ``layerwise solve --output``: pruned weights, or a pruned checkpoint.

The run works in ``OUT.partial`` with a journal of one block per layer, so a stopped run
continues after its last finished layer. Without a model the folder holds the weights in
files named as in the gram folder, by the name of the layer. With a model it holds
everything that a prune without error correction would have written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import DataError
from layerwise.grams.gram_folder import MANIFEST, GramManifest, StoredMatrix
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.hashes import file_sha256, tensor_hashes
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.checkpoints.storage import Checkpoint, write_checkpoint
from layerwise.run.data.calibration import Calibration
from layerwise.run.outputs.output import Outcome, versions, write_rest
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.block_files import MASK, WEIGHT
from layerwise.run.pipeline.destination import Destination
from layerwise.run.pipeline.journal import Journal
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.solver_identity import own_solver
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.solver import Solver


def recipe_of(manifest: GramManifest, zeros: ZeroWeights, certify: bool | None) -> Recipe:
    """Recipe of the prune that gives the same weights."""
    changes = {**zeros.recipe_fields(), "certify": certify}
    return manifest.recipe.model_copy(update=changes)


class SolvedFolder:
    """Output folder of one method at one pattern.

    Parameters
    ----------
    destination
        The folder that the run will become, and whether to continue or replace another.
    grams, manifest
        The gram folder, and its manifest.
    recipe
        Recipe of the prune that gives the same weights.
    solver
        The solver of all layers.
    model
        The checkpoint to copy, or None.
    machine
        Properties of the machine that decide the bytes: kind of device, threads.

    Raises
    ------
    DataError
        The checkpoint is damaged, or not the one that was calibrated.
    UsageError
        The output exists, or is an unfinished run with other arguments.
    """

    def __init__(
        self,
        destination: Destination,
        grams: Path,
        manifest: GramManifest,
        recipe: Recipe,
        solver: Solver,
        model: str | Path | None,
        machine: Mapping[str, Any],
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
            **own_solver(solver),
            **machine,
        }
        self._index = {name: i for i, (_, name, _) in enumerate(manifest.layers())}
        assert destination.output is not None
        self.journal = Journal(
            destination.output,
            identity,
            force=destination.force,
            resume=destination.resume,
            total=len(self._index),
            parts="layers",
        )

    def index(self, name: str) -> int:
        """Number of a layer, which is the number of its block in the journal."""
        return self._index[name]

    def finished(self, name: str) -> LayerRecord | None:
        """Figures of a finished layer, or None."""
        block = self.journal.read_block(self._index[name])
        return None if block is None else block.records[0]

    def finish(self) -> None:
        """Write the folder and rename it to the output."""
        if self._source is None:
            self._write_weights()
        else:
            self._write_checkpoint(self._source)
        self.journal.finish()

    def _tensor(self, kind: str, name: str) -> Tensor:
        """Weight or mask of a layer, (out, in)."""
        return self.journal.read_tensor(kind, self._index[name], name)

    def _stored(self, kind: str, layers: Mapping[str, StoredMatrix]) -> LazyTensors:
        """Weights or masks by parameter, in the orientation of the checkpoint."""

        def read(parameter: str) -> Tensor:
            name = parameter.removesuffix(".weight")
            tensor = self._tensor(kind, name)
            return tensor.T.contiguous() if layers[name].transposed else tensor

        return LazyTensors([f"{name}.weight" for name in layers], read)

    def _records(self) -> list[LayerRecord]:
        records = [self.finished(name) for name in self._index]
        return [record for record in records if record is not None]

    def _write_weights(self) -> None:
        """Write files like those of the gram folder, matrices (out, in)."""
        for file, stage in self._manifest.files.items():
            weights = {f"{n}.weight": self._tensor(WEIGHT, n) for n in stage.layers}
            atomic_write(self.journal.folder / file, save(weights))
        names = [f"{name}.weight" for name in self._index]
        masks = LazyTensors(names, lambda n: self._tensor(MASK, n.removesuffix(".weight")))
        self.journal.write_masks(masks)
        self.journal.write_layers(self._records())
        recipe = self._recipe.to_yaml().encode()
        atomic_write(self.journal.folder / "recipe.yaml", recipe)

    def _write_checkpoint(self, source: Checkpoint) -> None:
        """Write a copy of the source with the pruned tensors."""
        manifest, folder = self._manifest, self.journal.folder
        layers = {name: layer for _, name, layer in manifest.layers()}
        pruned = {f"{name}.weight": layer.tensor for name, layer in layers.items()}
        weights = self._stored(WEIGHT, layers)
        parameters = {tensor: parameter for parameter, tensor in pruned.items()}
        replaced = LazyTensors(parameters, lambda tensor: weights[parameters[tensor]])
        write_checkpoint(source, folder, replaced, overwrite=True)
        self.journal.write_masks(self._stored(MASK, layers))
        nothing = torch.empty(0, dtype=torch.int64)  # the windows themselves are not stored
        tokens = Calibration(nothing, manifest.calibration, manifest.calibration_sha256)
        write_rest(
            self.journal,
            Outcome(self._recipe, tokens, self._records(), source, None),
            source,
            pruned=pruned,
            transposed=[f"{n}.weight" for n, one in layers.items() if one.transposed],
            untouched=tensor_hashes(
                source.tensors(set(source.weight_map) - set(pruned.values()))
            ),
        )


def _calibrated(model: str | Path, manifest: GramManifest) -> Checkpoint:
    """Open the checkpoint; refuse one whose weights are not those that were calibrated."""
    source = Checkpoint.open(model)
    hashes = source.sha256()
    for name in sorted({*manifest.source, *hashes}):
        weights = name.endswith(".safetensors") or name == "config.json"
        if weights and manifest.source.get(name) != hashes.get(name):
            message = (
                f"{source.path} is not the model that was calibrated: {name} differs; "
                f"give the calibrated one"
            )
            raise DataError(message)
    return source

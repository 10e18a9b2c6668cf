"""Inputs of a retraining: a pruned model, its masks, and the model before pruning.

Masks come from the journal of the pruning run. They are never derived from the zeros of the
weights, but must agree with them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters import Adapter
from layerwise.errors import UsageError
from layerwise.recovery.trainable import ParameterSets
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.objects import check_object
from layerwise.run.models.opening import OpenedModel, load_model, open_model
from layerwise.run.outputs.output import Manifest
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.journal import read_masks

CARD = "README.md"  # people add to it


@dataclass(frozen=True)
class Pruned:
    """A pruned model, its masks, and the manifest of its folder."""

    opened: OpenedModel
    masks: Mapping[str, Tensor]
    manifest: Manifest | None = None

    @property
    def model(self) -> Any:
        """The pruned model."""
        return self.opened.model

    @property
    def adapter(self) -> Adapter:
        """Declaration of its architecture."""
        return self.opened.adapter

    @property
    def source(self) -> Checkpoint | None:
        """Folder of the pruned model; None for a model object."""
        return self.opened.source

    @classmethod
    def open(
        cls,
        model_or_path: Any,
        masks: Mapping[str, Tensor] | None,
        sets: ParameterSets,
        output: Path | None,
    ) -> "Pruned":
        """Open a folder, or take a model object with its masks; both are checked."""
        if isinstance(model_or_path, nn.Module):
            if masks is None and sets.on_weights:
                message = (
                    f"{sets.on_weights[0]} needs the masks of the pruning run, which a "
                    f"model object does not have: give masks=report.masks"
                )
                raise UsageError(message)
            pruned = cls(open_model(model_or_path, streamed=False), dict(masks or {}))
            if output is not None:
                pruned.stored()  # raises
        else:
            if masks is not None:
                message = "give masks only with a model object; a folder has its own"
                raise UsageError(message)
            folder = Checkpoint.open(model_or_path).path
            manifest = Manifest.read(folder)
            manifest.refuse_changed(folder, set(manifest.files) - {CARD})
            opened = open_model(folder, streamed=False)
            if manifest.smaller is None:
                kept = dict(read_masks(folder))
            else:  # the remaining weights of a smaller model are dense
                kept = _full_masks(opened.model, opened.adapter)
            pruned = cls(opened, kept, manifest)
        pruned._check_masks()
        return pruned

    def stored(self) -> tuple[Checkpoint, Manifest]:
        """Return the folder that was opened and its manifest, to write a copy of it.

        Raises
        ------
        UsageError
            There is none: the model was given as an object.
        """
        if self.source is None or self.manifest is None:
            message = (
                "a model object cannot be written to output_dir, because the masks are "
                "copied from a folder: give the folder of the pruned model"
            )
            raise UsageError(message)
        return self.source, self.manifest

    @property
    def blocks(self) -> dict[str, nn.Module]:
        """Decoder blocks by full name."""
        return unchecked_blocks(self.model, self.adapter)

    def _check_masks(self) -> None:
        own = dict(self.model.named_parameters())
        for name, mask in self.masks.items():
            if name not in own or own[name].shape != mask.shape or mask.dtype != torch.bool:
                shape = tuple(own[name].shape) if name in own else "no such parameter"
                message = (
                    f"the mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}, but "
                    f"the model has {shape}: give the masks of this model"
                )
                raise UsageError(message)
            zeros = own[name].detach()[~mask.to(own[name].device)]
            if bool((zeros != 0).any()):
                message = (
                    f"{name} has {int((zeros != 0).sum())} nonzero weights that its mask "
                    f"removes: give the pruned model and its own masks"
                )
                raise UsageError(message)

    def dense_model(self, given: nn.Module | str | Path | None) -> Any:
        """Open the model before pruning."""
        if isinstance(given, nn.Module):
            check_object(given)
            return given
        path = given
        if path is None and self.source is not None:
            recipe = self.source.path / "recipe.yaml"
            path = Recipe.read(recipe).model if recipe.is_file() else None
        if path is None:
            message = (
                "a reconstruction needs the model before pruning: give dense (--dense), or "
                "choose the objective tokens"
            )
            raise UsageError(message)
        dense = load_model(Checkpoint.open(path))
        ours, theirs = (m.config.get_text_config() for m in (self.model, dense))
        if (ours.model_type, ours.hidden_size) != (theirs.model_type, theirs.hidden_size):
            message = (
                f"{path} and the pruned model differ in architecture: give the model that "
                f"was pruned"
            )
            raise UsageError(message)
        return dense


def _full_masks(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """Masks that keep all weights of all linears of the blocks."""
    masks = {}
    for block_name, block in unchecked_blocks(model, adapter).items():
        for name in adapter.linear_names(block_name):
            weight = block.get_parameter(f"{name}.weight")
            masks[f"{block_name}.{name}.weight"] = torch.ones_like(weight, dtype=torch.bool)
    return masks


def unchecked_blocks(model: Any, adapter: Adapter) -> dict[str, nn.Module]:
    """Blocks by full name, where a module for narrow values may replace a linear."""
    layers = model.get_submodule(adapter.blocks)
    return {f"{adapter.blocks}.{i}": block for i, block in enumerate(layers)}

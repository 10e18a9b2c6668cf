"""The native format: blocks of different widths, which transformers alone cannot represent.

A folder in this format has smaller safetensors, ``surgery.json`` with the record of the
cuts, and a ``config.json`` that holds the original configuration under a model type that
transformers does not know. So the stock library refuses it instead of filling tensors that
do not fit with random numbers. :func:`layerwise.load` builds the original model without
memory, repeats the cuts on it, and loads the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError
from torch import nn

from layerwise.adapters import ADAPTERS, Adapter, get_adapter
from layerwise.errors import (
    DataError,
    LayerwiseError,
    UnsupportedModelError,
    UsageError,
    one_line,
)
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.strict_json import read_object
from layerwise.run.checkpoints.validation import check_config
from layerwise.run.models.loading import load_as, quiet_transformers
from layerwise.run.models.narrow import GatheredLinear, ScatteredLinear
from layerwise.run.models.native_type import MODEL_TYPE
from layerwise.run.models.rewrite import update_bias_attributes
from layerwise.run.models.stock import skeleton
from layerwise.run.models.surgery import Cut, shrink, steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from layerwise.run.checkpoints.storage import Checkpoint

SURGERY = "surgery.json"
VERSION = 1
Unit = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
LINEARS = (nn.Linear, ScatteredLinear, GatheredLinear)


class Surgery(BaseModel):
    """Content of ``surgery.json``: cuts in their order, and biases that were added."""

    model_config = ConfigDict(extra="forbid")

    version: StrictInt
    steps: list[dict[str, dict[str, list[Unit]]]]  # block -> coupling -> kept units
    biases: list[str]  # linears whose bias was added

    @classmethod
    def read(cls, path: Path) -> Surgery:
        """Read the surgery of a native folder."""
        try:
            surgery = cls.model_validate(read_object(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            message = f"{path} is damaged at {where}: {first['msg']}; restore the file"
            raise DataError(message) from error
        if surgery.version != VERSION:
            message = (
                f"{path} has version {surgery.version}, this layerwise reads {VERSION}: "
                f"install a newer layerwise"
            )
            raise DataError(message)
        return surgery

    def repeat(self, adapter: Adapter, path: Path, model: nn.Module) -> None:
        """Give a model of the original configuration the smaller parameters."""
        try:
            for step in self.steps:
                cuts = [
                    Cut(block, name, torch.tensor(kept, dtype=torch.long, device="cpu"))
                    for block, by_name in step.items()
                    for name, kept in by_name.items()
                ]
                shrink(model, adapter, cuts, format="native")
            for name in self.biases:
                _give_bias(model, adapter, name)
            update_bias_attributes(model, adapter)
        except LayerwiseError as error:
            message = f"{path} does not fit its config.json: {one_line(error)}"
            raise DataError(message) from error


def save_native(
    model: Any, folder: str | os.PathLike[str], *, max_shard_size: str = "5GB"
) -> None:
    """Write a model that was cut with ``format="native"``.

    Parameters
    ----------
    model
        The model, with the configuration that it had before the cuts.
    folder
        Folder of the files; the tokenizer is written separately.
    max_shard_size
        Largest safetensors file, as for ``save_pretrained``.

    Raises
    ------
    UsageError
        If the model has parameters that the record of its cuts does not explain.
    """
    folder = Path(folder)
    surgery = Surgery(version=VERSION, steps=steps_of(model), biases=_added_biases(model))
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    text = json.dumps(surgery.model_dump(), separators=(",", ":"))
    atomic_write(folder / SURGERY, text.encode())
    original = read_object(folder / "config.json")
    config = {"model_type": MODEL_TYPE, "original": original}
    atomic_write(folder / "config.json", json.dumps(config, indent=2).encode())


def load_native(checkpoint: Checkpoint, device: torch.device | str) -> PreTrainedModel:
    """Load the model of a native folder.

    See :func:`layerwise.run.models.loading.load_stock`.

    Raises
    ------
    DataError
        Configuration, surgery and tensors do not fit each other.
    UnsupportedModelError
        This version does not know the original architecture.
    """
    config, operate = read_native(checkpoint)
    model = load_as(checkpoint, config, device, operate)
    for module in model.modules():
        if isinstance(module, ScatteredLinear | GatheredLinear):
            module.restore()  # loading leaves buffers empty that are not stored
    return model


def read_native(checkpoint: Checkpoint) -> tuple[Any, Callable[[nn.Module], None]]:
    """Original configuration of a native folder, and the function that repeats the cuts."""
    from transformers import CONFIG_MAPPING

    path = checkpoint.path / "config.json"
    original = checkpoint.config.get("original")
    if not isinstance(original, dict):
        message = f"{path} lacks the original configuration: restore the file"
        raise DataError(message)
    check_config(original, checkpoint.path)
    family = original["model_type"]
    if family not in ADAPTERS:
        message = (
            f"{path} holds a model of type {family[:40]!r}, which this layerwise cannot "
            f"cut: install a newer layerwise"
        )
        raise UnsupportedModelError(message)
    surgery_path = checkpoint.path / SURGERY
    surgery = Surgery.read(surgery_path)
    with quiet_transformers():
        try:
            config = CONFIG_MAPPING[family].from_dict(original)
        except Exception as error:
            message = f"{path} is invalid: {one_line(error)}"
            raise DataError(message) from error
    return config, partial(surgery.repeat, get_adapter(family), surgery_path)


def _added_biases(model: Any) -> list[str]:
    """Linears with a bias that the configuration does not have."""
    before = dict(skeleton(model, model.config).named_parameters())
    added = [name for name, _ in model.named_parameters() if name not in before]
    for name in added:
        if not name.endswith(".bias"):
            message = f"{name} is not a parameter of this {type(model).__name__}: remove it"
            raise UsageError(message)
    return [name.removesuffix(".bias") for name in added]


def _give_bias(model: nn.Module, adapter: Adapter, name: str) -> None:
    modules = dict(model.named_modules())
    linear = modules.get(name)
    inside = name.startswith(f"{adapter.blocks}.")
    if not inside or not isinstance(linear, LINEARS) or linear.bias is not None:
        message = f"{name!r} is not a linear layer of a block without bias"
        raise UsageError(message)
    linear.bias = nn.Parameter(torch.empty_like(linear.weight[:, 0]))

"""Checks of a folder with a smaller model: its shapes, its size, and what can open it.

Stock transformers must open a folder in the stock format with every tensor that it holds.
The library drops tensors that are not in the configuration, such as a bias, and then
computes something else. It must not open a folder in the native format at all.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.adapters import Adapter, get_adapter
from layerwise.errors import DataError, LayerwiseError
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.checkpoints.strict_json import read_object
from layerwise.run.models.accounts import checkpoint_names
from layerwise.run.models.loading import load_stock
from layerwise.run.models.opening import load_model
from layerwise.run.models.rewrite import parameters_of
from layerwise.run.outputs.checks import Check, files, shards, untouched
from layerwise.run.outputs.output import Manifest
from layerwise.run.outputs.smaller import CHANNELS, Smaller
from layerwise.run.pipeline.destination import FOLDER
from layerwise.run.pipeline.journal import read_layers


def verify_smaller(
    folder: Path, checkpoint: Checkpoint, manifest: Manifest, smaller: Smaller
) -> list[Check]:
    """Check a folder with a smaller model that ``layerwise prune`` wrote.

    Raises
    ------
    DataError
        If a file of the folder cannot be read.
    """
    read_layers(folder)
    opens, model = _opens(checkpoint, smaller)
    checks = [
        _shapes(checkpoint, smaller),
        _finite(checkpoint, smaller),
        untouched(checkpoint, manifest, set(smaller.changed)),
        shards(checkpoint, manifest),
        files(checkpoint, manifest),
        opens,
    ]
    if model is not None:
        adapter = get_adapter(model.config.model_type)
        layers = model.get_submodule(adapter.blocks)
        blocks = {f"{adapter.blocks}.{i}": block for i, block in enumerate(layers)}
        checks.append(_size(blocks, smaller))
        if smaller.format != "padded":
            checks.append(_channels(folder, blocks, adapter))
    return checks


def _shapes(checkpoint: Checkpoint, smaller: Smaller) -> Check:
    entries = checkpoint.entries()
    problems = []
    for name, shape in smaller.changed.items():
        if name not in entries:
            problems.append(f"{name}: the tensor is missing")
        elif list(entries[name].shape) != shape:
            problems.append(f"{name}: has {list(entries[name].shape)}, not {shape}")
    claim = f"{len(smaller.changed)} changed tensors have the shapes that the run gave them"
    return Check(claim, tuple(problems))


def _finite(checkpoint: Checkpoint, smaller: Smaller) -> Check:
    names = set(smaller.changed) & set(checkpoint.weight_map)
    problems = tuple(
        f"{name}: not finite"
        for name, tensor in checkpoint.tensors(names)
        if not bool(torch.isfinite(tensor).all())
    )
    return Check("every changed tensor is finite", problems)


def _opens(checkpoint: Checkpoint, smaller: Smaller) -> tuple[Check, Any]:
    """Whether the right library opens the folder, and the model."""
    if smaller.format == "native":
        return _opens_natively(checkpoint)
    claim = "stock transformers opens it, with every tensor of the files"
    try:
        model = load_stock(checkpoint, "cpu")
    except LayerwiseError as error:
        return Check(claim, (str(error),)), None
    loaded = set(checkpoint_names(model, checkpoint).values()) | set(model.state_dict())
    dropped = sorted(set(checkpoint.weight_map) - loaded)
    problems = tuple(f"{name}: stock transformers drops it" for name in dropped)
    return Check(claim, problems), model


def _opens_natively(checkpoint: Checkpoint) -> tuple[Check, Any]:
    claim = "layerwise.load opens it, and stock transformers refuses it"
    problems = []
    model = None
    try:
        model = load_model(checkpoint)
    except LayerwiseError as error:
        problems.append(str(error))
    if stock_opens(checkpoint.path):
        problems.append("config.json: stock transformers opens it as something else")
    return Check(claim, tuple(problems)), model


def stock_opens(folder: Path) -> bool:
    """Whether stock transformers accepts the configuration of a folder."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:
        return False
    return True


def _size(blocks: Mapping[str, nn.Module], smaller: Smaller) -> Check:
    parameters = parameters_of(blocks)
    claim = (
        f"the blocks have {smaller.parameters_after:,} parameters, "
        f"{1 - smaller.parameters_after / smaller.parameters_before:.2%} fewer than before"
    )
    same = parameters == smaller.parameters_after
    return Check(claim, () if same else (f"they have {parameters:,}",))


def _channels(folder: Path, blocks: Mapping[str, nn.Module], adapter: Adapter) -> Check:
    """Whether the record of the kept units fits the widths of the model."""
    path = folder / FOLDER / CHANNELS
    if not path.is_file():
        message = f"{path} is missing: the folder is incomplete; prune again"
        raise DataError(message)
    kept: dict[str, dict[str, list[int]]] = read_object(path)
    problems = []
    for block, by_name in kept.items():
        for coupling in adapter.couplings:
            if coupling.name not in by_name or coupling.unit == "value":
                continue
            units = coupling.resolve(blocks[block], block).units
            if units != len(by_name[coupling.name]):
                problems.append(
                    f"{block}: {units} units of {coupling.name}, "
                    f"{len(by_name[coupling.name])} on record"
                )
    return Check("the channels on record are those of the model", tuple(problems))

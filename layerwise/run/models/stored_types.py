"""Tensors whose type in the files is not the type in which a model computes.

transformers gives every parameter the type that ``config.json`` names, whatever the files
hold. A run computes in that type. But it poses its problems with the weights of the files,
and its results get their type, so that nothing is lost where the files are more precise.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from layerwise.adapters import Adapter
from layerwise.adapters.linear import is_transposed
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.checkpoints.shard import FLOATS
from layerwise.run.checkpoints.storage import Checkpoint, checkpoint_names


def other_types(checkpoint: Checkpoint, model: nn.Module) -> dict[str, str]:
    """Stored tensors of the parameters that have another type in the files, by parameter.

    Parameters
    ----------
    checkpoint, model
        A folder, and its model on any device, in the type of a run.
    """
    entries = checkpoint.entries()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: stored
        for name, stored in checkpoint_names(model, checkpoint).items()
        if FLOATS[entries[stored].dtype] != parameters[name].dtype
    }


def read_stored_weights(
    checkpoint: Checkpoint, model: nn.Module, adapter: Adapter
) -> Mapping[str, Tensor]:
    """Weights of linears, (out, in), that have another type in the files, by linear."""
    stored = other_types(checkpoint, model)
    linears: dict[str, tuple[str, bool]] = {}
    for block_name, block in adapter.blocks_of(model).items():
        for name in adapter.linear_names(block_name):
            full = f"{block_name}.{name}"
            if (tensor := stored.get(f"{full}.weight")) is not None:
                linears[full] = tensor, is_transposed(adapter.linear(block, name))

    def read(name: str) -> Tensor:
        tensor, transposed = linears[name]
        weight = read_tensor(checkpoint, tensor)
        return weight.T if transposed else weight

    return LazyTensors(linears, read)


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor of a checkpoint."""
    return next(tensor for _, tensor in checkpoint.tensors([name]))


def in_stored_type(checkpoint: Checkpoint, name: str, value: Tensor) -> Tensor:
    """New values of a tensor, in the type of the file; unchanged entries keep their bits."""
    stored = read_tensor(checkpoint, name)
    if stored.dtype == value.dtype:
        return value
    value = value.to(stored.device)
    return torch.where(value == stored.to(value.dtype), stored, value.to(stored.dtype))

"""Tensors whose type in the files is not the type in which a model computes.

transformers gives every parameter the type that ``config.json`` names, whatever the files
hold. A run computes in that type. But it poses its problems with the weights of the files,
and its results get their type, so that nothing is lost where the files are more precise.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters import Adapter
from layerwise.adapters.linear import is_transposed
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.hashes import digests, tensor_hashes
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.checkpoints.shard import FLOATS
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.checkpoints.strict_json import read_object
from layerwise.run.models.accounts import checkpoint_names


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
    """New values of a tensor in the type of its file; unchanged entries keep their bits."""
    stored = read_tensor(checkpoint, name)
    if stored.dtype == value.dtype:
        return value
    value = value.to(stored.device)
    return torch.where(value == stored.to(value.dtype), stored, value.to(stored.dtype))


def weight_bytes(checkpoint: Checkpoint, model: nn.Module, linears: Iterable[str]) -> int:
    """Bytes of the weights of linears in the types of the files."""
    entries, names = checkpoint.entries(), checkpoint_names(model, checkpoint)
    total = 0
    for weight in (f"{name}.weight" for name in linears):
        parameter = model.get_parameter(weight)
        here = parameter.numel() * parameter.element_size()
        total += entries[names[weight]].n_bytes if weight in names else here
    return total


def stored_digests(checkpoint: Checkpoint | None, model: nn.Module) -> dict[str, str]:
    """Hash of every tensor of a model as its file holds it, by the name in the model."""
    hashes = digests(model)
    if checkpoint is None:
        return hashes
    other = other_types(checkpoint, model)
    tensors = ((name, read_tensor(checkpoint, stored)) for name, stored in other.items())
    return hashes | tensor_hashes(tensors)


@dataclass(frozen=True)
class RunTypes:
    """Types that the parameters of a model have during a run.

    Parameters
    ----------
    main
        Type of the model.
    by_name
        Types of the parameters that have another one in the files.
    """

    main: torch.dtype
    by_name: Mapping[str, torch.dtype]

    def name_in(self, folder: Path, model: Any) -> None:
        """Write the main type to ``config.json``: save_pretrained names a stored one."""
        if not self.by_name:
            return
        model.config.dtype = self.main
        path = folder / "config.json"
        config = read_object(path)
        config.get("original", config)["dtype"] = str(self.main).removeprefix("torch.")
        atomic_write(path, (json.dumps(config, indent=2) + "\n").encode())

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Give the parameters these types again; a new bias gets that of its weight."""
        for name, parameter in model.named_parameters():
            weight = f"{name.rpartition('.')[0]}.weight"
            dtype = self.by_name.get(name, self.by_name.get(weight))
            if dtype is not None:
                parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def take_stored_types(
    checkpoint: Checkpoint, model: Any, weights: Mapping[str, Tensor]
) -> RunTypes:
    """Give every parameter of a model the type of its file, unchanged entries its bits.

    Parameters
    ----------
    checkpoint, model
        A folder, and its model after a run.
    weights
        New values of parameters, in the types of the files, by name.
    """
    main, types = model.dtype, {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in other_types(checkpoint, model).items():
        parameter = parameters[name]
        types[name] = parameter.dtype
        value = weights.get(name)
        if value is None:
            value = in_stored_type(checkpoint, stored, parameter.data)
        parameter.data = value.to(parameter.device)
    stored_names = checkpoint_names(model, checkpoint)
    for name in parameters.keys() - stored_names.keys():  # biases that were added
        weight = parameters[f"{name.rpartition('.')[0]}.weight"]
        parameters[name].data = parameters[name].data.to(weight.dtype)
    return RunTypes(main, types)

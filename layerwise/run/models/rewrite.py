"""Small changes to modules: parameters of another size, biases, and their attributes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters import Adapter, Channels, Coupling
from layerwise.errors import UnsupportedModelError


def has_bias(block: nn.Module, linear: str) -> bool:
    """Whether a linear of a block has a bias."""
    return block.get_submodule(linear)._parameters.get("bias") is not None


def add_bias(linear: nn.Module, shift: Tensor) -> None:
    """Add a shift to the bias of a linear layer; create the bias if there is none."""
    weight = linear.get_parameter("weight")
    old = linear._parameters.get("bias")
    if old is None:
        new = shift.to(weight.device, weight.dtype, copy=True)
        linear.bias = nn.Parameter(new, requires_grad=weight.requires_grad)
    else:
        with torch.no_grad():
            old.add_(shift.to(old.device))


def update_bias_attributes(model: Any, adapter: Adapter) -> None:
    """Set the attributes by which a module knows whether its linears have a bias."""
    blocks = model.get_submodule(adapter.blocks)
    for coupling in adapter.couplings:
        if coupling.bias is not None and coupling.bias.attribute is not None:
            for block in blocks:
                value = has_bias(block, coupling.consumers[-1])
                set_attribute(block, coupling.bias.attribute, value)


def update_attributes(
    block: nn.Module, block_name: str, coupling: Coupling, channels: Channels, units: int
) -> None:
    """Set the attributes read by `forward` to another number of units."""
    counts = coupling.counts(block, channels, units)
    for name, count in coupling.attributes.items():
        check_attribute(block, block_name, name)
        set_attribute(block, name, counts[count])


def synchronise(module: nn.Module) -> None:
    """Set the sizes stated by a module to those of its parameters."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d):  # depthwise
        n = len(module.weight)
        module.in_channels = module.out_channels = module.groups = n


def replace_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by another tensor."""
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    old = module.get_parameter(own)
    setattr(module, own, nn.Parameter(value, requires_grad=old.requires_grad))


def check_attribute(block: nn.Module, block_name: str, name: str) -> None:
    """Refuse a block without an attribute that must be set to a new size."""
    path, _, own = name.rpartition(".")
    if not hasattr(block.get_submodule(path), own):
        message = (
            f"no attribute {block_name}.{name} to hold the new size: this version of "
            f"transformers has another name for it; install a supported version"
        )
        raise UnsupportedModelError(message)


def set_attribute(block: nn.Module, name: str, value: object) -> None:
    """Set an attribute of a module of a block by its dotted name."""
    path, _, own = name.rpartition(".")
    setattr(block.get_submodule(path), own, value)


def set_bias(linear: nn.Module, bias: Tensor) -> None:
    """Set the bias of a linear layer to these values."""
    weight = linear.get_parameter("weight")
    new = bias.to(weight.device, weight.dtype, copy=True)
    linear.bias = nn.Parameter(new, requires_grad=weight.requires_grad)


def parameters_of(blocks: Mapping[str, nn.Module]) -> int:
    """Number of parameters of the decoder blocks."""
    return sum(p.numel() for block in blocks.values() for p in block.parameters())

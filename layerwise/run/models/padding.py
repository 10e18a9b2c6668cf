"""Padding of blocks of different widths to one width, with channels of zeros.

A smaller model of the native format becomes one of the stock format: every block gets as
many units as the widest, and the new units are zero in every parameter, so that they
contribute nothing. The padding takes memory again. Against the model before the cut, the
saving is the difference to the widest block.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters import Adapter, Coupling
from layerwise.errors import UsageError
from layerwise.run.models.narrow import GatheredLinear, ScatteredLinear, spread
from layerwise.run.models.rewrite import replace_parameter, synchronise, update_attributes
from layerwise.run.models.stock import holds_width, plan_stock, skeleton
from layerwise.run.models.surgery import make_stock


@torch.no_grad()
def pad_to_widest(model: Any, adapter: Adapter) -> None:
    """Turn a model that :func:`~layerwise.run.models.surgery.shrink` cut into a stock one.

    Parameters
    ----------
    model
        A model of the native format, changed in place: its logits stay the same, its
        configuration becomes that of the widest block. Structures that the stock format
        cannot represent (narrower values, heads of OPT) get their old width back.
    adapter
        Declaration of the model.

    Raises
    ------
    UsageError
        If the stock format has no place for a bias of the model. The model then still
        computes the same.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, ScatteredLinear | GatheredLinear):
            model.set_submodule(name, spread(module))
    blocks = adapter.blocks_of(model)
    full = adapter.blocks_of(skeleton(model, model.config))
    widths: dict[str, dict[str, int]] = {}
    for coupling in adapter.couplings:
        if coupling.unit != "value":
            units = _common_width(model, adapter, coupling, blocks, full)
            widths[coupling.name] = dict.fromkeys(blocks, units)
            for name, block in blocks.items():
                _pad(block, name, coupling, units)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    stock = plan_stock(model, adapter, widths, shapes)
    make_stock(model, adapter, stock.changes, stock.zero_biases)


def _common_width(
    model: Any,
    adapter: Adapter,
    coupling: Coupling,
    blocks: Mapping[str, nn.Module],
    full: Mapping[str, nn.Module],
) -> int:
    """Smallest width of all blocks that the stock format accepts."""
    widest = max(coupling.resolve(block, name).units for name, block in blocks.items())
    original = max(coupling.resolve(block, name).units for name, block in full.items())
    for units in range(widest, original if coupling.stock else 0):
        if holds_width(model, adapter, coupling.name, units):
            return units
    if widest > original:
        message = (
            f"{coupling.name!r} are wider than the configuration of the model says: "
            f"correct the configuration"
        )
        raise UsageError(message)
    return original


def _pad(block: nn.Module, block_name: str, coupling: Coupling, units: int) -> None:
    """Give the channels of a block more units, with zeros in every parameter."""
    channels = coupling.resolve(block, block_name)
    if channels.units == units:
        return
    for name, (axis, _) in channels.members.items():
        old = block.get_parameter(name).detach()
        size = old.shape[axis] // channels.units * units
        labels = coupling.labels(block, name, axis, size, units)
        assert labels is not None  # the old size divides by the old number of units
        replace_parameter(block, name, _widened(old, axis, labels < channels.units))
        synchronise(block.get_submodule(name.rpartition(".")[0]))
    update_attributes(block, block_name, coupling, channels, units)


def _widened(old: Tensor, axis: int, taken: Tensor) -> Tensor:
    """Widen an axis of a tensor: old entries where `taken`, zeros elsewhere."""
    shape = list(old.shape)
    shape[axis] = len(taken)
    wide = torch.zeros(shape, dtype=old.dtype, device=old.device)
    wide.index_copy_(axis, taken.nonzero()[:, 0].to(old.device), old)
    return wide

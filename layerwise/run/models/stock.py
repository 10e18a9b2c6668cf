"""The stock format: a model that transformers alone can open.

A stock configuration has one width for all blocks, one flag for the biases of several
linears, and rules of its own. Everything is checked before a model is touched. The last
check is by transformers itself: it builds the model of the new configuration without
memory, which must have exactly the tensors of the smaller model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from layerwise.adapters import Adapter, BiasFlag, Coupling, get_coupling
from layerwise.errors import UsageError, one_line
from layerwise.run.models.loading import quiet_transformers
from layerwise.run.models.rewrite import has_bias

Format = Literal["stock", "native"]
# a padded folder holds a native model, padded with zeros for stock transformers
OutputFormat = Literal["stock", "native", "padded"]
OUTPUT_FORMATS: tuple[str, ...] = get_args(OutputFormat)
FORMATS: tuple[Format, ...] = ("stock", "native")
Shapes = dict[str, tuple[int, ...]]
OTHERWISE = "choose format 'native'"


@dataclass(frozen=True)
class StockPlan:
    """Changes by which a model gets the stock format.

    Parameters
    ----------
    changes
        Fields of the configuration and their new values.
    zero_biases
        Linears, by full name, that get a bias of zeros because others share their flag.
    """

    changes: Mapping[str, Any]
    zero_biases: Sequence[str]


def check_format(
    model: Any, adapter: Adapter, names: Collection[str], format: str, *, bias: bool = False
) -> None:
    """Refuse a format that cannot represent the result of a run, before the run.

    Parameters
    ----------
    model, adapter
        The model and its declaration.
    names
        Couplings that lose channels, the same number in every block.
    format
        ``"stock"`` or ``"native"``.
    bias
        Whether the main consumers will get a bias.

    Raises
    ------
    UsageError
        If the format cannot represent the model; the message says what to change.
    UnsupportedModelError
        If a coupling is not declared for this architecture.
    """
    if format not in FORMATS:
        message = f"format is {format!r}: choose one of {', '.join(FORMATS)}"
        raise UsageError(message)
    couplings = [get_coupling(adapter, name) for name in names]
    if format == "native":
        return
    for coupling in couplings:
        if not coupling.stock:
            raise UsageError(_no_place(adapter, coupling))
        if bias and not holds_bias(model, adapter, coupling.consumers[-1]):
            raise UsageError(_no_bias(adapter, coupling.consumers[-1]))


def holds_bias(model: Any, adapter: Adapter, linear: str) -> bool:
    """Whether a linear of the blocks has a bias, or the stock format can give it one."""
    blocks = adapter.blocks_of(model)
    if all(has_bias(block, linear) for block in blocks.values()):
        return True
    return _flag_of(model, adapter, linear) is not None


def holds_width(model: Any, adapter: Adapter, name: str, units: int) -> bool:
    """Whether the stock format accepts `units` units of a coupling in every block."""
    coupling = get_coupling(adapter, name)
    block = next(iter(adapter.blocks_of(model).values()))
    counts = coupling.counts(block, coupling.resolve(block), units)
    changes = {name: counts[count] for name, count in coupling.stock.items()}
    try:
        stock_config(model.config, changes)
    except UsageError:
        return False
    return bool(changes)


def plan_stock(
    model: Any,
    adapter: Adapter,
    widths: Mapping[str, Mapping[str, int]],
    shapes: Shapes,
) -> StockPlan:
    """Check that the stock format can represent a model; return the changes it needs.

    Parameters
    ----------
    model, adapter
        The model, not yet cut, and its declaration.
    widths
        Number of kept units: coupling -> full name of a block -> number.
    shapes
        Shape of every parameter after the cut.

    Raises
    ------
    UsageError
        If the format cannot represent the model; the message says what to change.
    """
    blocks = adapter.blocks_of(model)
    before = skeleton(model, model.config)
    reference = adapter.blocks_of(before)
    changes: dict[str, Any] = {}
    for name, by_block in widths.items():
        coupling = get_coupling(adapter, name)
        units = _one_width(name, by_block)
        first = next(iter(by_block))
        if units == coupling.resolve(reference[first], first).units:
            continue
        if not coupling.stock:
            raise UsageError(_no_place(adapter, coupling))
        channels = coupling.resolve(blocks[first], first)
        counts = coupling.counts(blocks[first], channels, units)
        changes |= {name: counts[count] for name, count in coupling.stock.items()}
    zero_biases: list[str] = []
    for flag in _flags_needed(model, adapter, blocks, reference):
        changes[flag.field] = True
        for block_name, block in blocks.items():
            for linear in flag.linears:
                if not has_bias(block, linear):
                    zero_biases.append(f"{block_name}.{linear}")
    config = stock_config(model.config, changes)
    for linear in zero_biases:
        shapes = {**shapes, f"{linear}.bias": shapes[f"{linear}.weight"][:1]}
    _compare(skeleton(model, config), shapes)
    return StockPlan(changes, zero_biases)


def stock_config(config: Any, changes: Mapping[str, Any]) -> Any:
    """Copy of a configuration with other values, as if read from a file."""
    with quiet_transformers():
        try:
            return type(config).from_dict({**config.to_dict(), **changes})
        except Exception as error:
            fields = ", ".join(f"{name}={value}" for name, value in changes.items())
            message = (
                f"transformers refuses {fields} ({one_line(error)}): keep another number, "
                f"or {OTHERWISE}"
            )
            raise UsageError(message) from error


def skeleton(model: Any, config: Any) -> Any:
    """Model of the same class with another configuration, without memory."""
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(config)


def _one_width(name: str, by_block: Mapping[str, int]) -> int:
    """Width that all blocks share."""
    smallest = min(by_block, key=by_block.__getitem__)
    largest = max(by_block, key=by_block.__getitem__)
    if by_block[smallest] != by_block[largest]:
        message = (
            f"a stock model has one width for all blocks, but {smallest} would keep "
            f"{by_block[smallest]} units of {name!r} and {largest} {by_block[largest]}: "
            f"keep the same number, {OTHERWISE}, or pad to the widest block"
        )
        raise UsageError(message)
    return by_block[smallest]


def _no_place(adapter: Adapter, coupling: Coupling) -> str:
    others = [other.name for other in adapter.couplings if other.stock]
    return (
        f"the stock format of {adapter.name} has no place for fewer {coupling.name!r}: "
        f"{OTHERWISE}, or remove {' or '.join(others)}"
    )


def _no_bias(adapter: Adapter, linear: str) -> str:
    return (
        f"the stock format of {adapter.name} has no place for a bias of {linear}: "
        f"{OTHERWISE}, or a method without bias"
    )


def _flag_of(model: Any, adapter: Adapter, linear: str) -> BiasFlag | None:
    """Flag that gives a linear a bias, if this configuration has it."""
    flags = [coupling.bias for coupling in adapter.couplings if coupling.bias is not None]
    own = [f for f in flags if linear in f.linears and hasattr(model.config, f.field)]
    return own[0] if own else None


def _flags_needed(
    model: Any,
    adapter: Adapter,
    blocks: Mapping[str, nn.Module],
    reference: Mapping[str, nn.Module],
) -> list[BiasFlag]:
    """Flags of linears with a bias that the configuration does not have."""
    needed: list[BiasFlag] = []
    for block_name, block in blocks.items():
        for linear in adapter.linear_names(block_name):
            if has_bias(block, linear) and not has_bias(reference[block_name], linear):
                flag = _flag_of(model, adapter, linear)
                if flag is None:
                    raise UsageError(_no_bias(adapter, linear))
                if flag not in needed:
                    needed.append(flag)
    return needed


def _compare(expected: nn.Module, shapes: Shapes) -> None:
    """Refuse a model whose tensors differ from those of the stock model."""
    stock = {name: tuple(p.shape) for name, p in expected.named_parameters()}
    for name in sorted({*stock, *shapes}):
        if stock.get(name) != shapes.get(name):
            message = (
                f"{name} would have shape {shapes.get(name)}, but the stock model has "
                f"{stock.get(name)}: {OTHERWISE}"
            )
            raise UsageError(message)

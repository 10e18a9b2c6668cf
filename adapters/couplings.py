"""Couplings: rows and columns of a block that are removed together with its channels.

A *channel* is an intermediate value that some modules compute (producers) and linear layers
read (consumers). If its columns in the consumers are zero, its rows in the producers have
no effect, and can be removed at no cost. Channels that can only be removed together form a
*unit*.

Like the stages of an adapter, a coupling is a declaration. Sizes are read from the block,
so that it also holds for a block that is already smaller.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from layerwise.adapters.linear import is_linear
from layerwise.errors import UnsupportedModelError
from layerwise.patterns import Columns

Count = Literal["units", "query_heads", "head_dim"]


@dataclass(frozen=True)
class BiasFlag:
    """Field of a configuration that gives several linears a bias at once.

    Parameters
    ----------
    field
        Name in the configuration.
    linears
        All linears of a block that the field affects.
    attribute
        Attribute of a module of the block with the same value, or None.
    """

    field: str
    linears: tuple[str, ...]
    attribute: str | None = None


@dataclass(frozen=True)
class Channels:
    """Coupled channels of one block, as index lists.

    Parameters
    ----------
    name
        Name of the coupling.
    units
        Number of units.
    groups
        Unit of each column of the main consumer, shape (in,).
    balance
        Head of each unit if all heads must keep equally many, shape (units,); else None.
    members
        Parameter name relative to the block -> (axis, unit of each index of that axis);
        -1 marks indices that are always kept.
    cost
        Number of parameters that are removed with one unit, biases included.
    """

    name: str
    units: int
    groups: Tensor
    balance: Tensor | None
    members: Mapping[str, tuple[int, Tensor]]
    cost: int

    def pattern(self, keep: int) -> Columns:
        """Pattern of the main consumer that keeps `keep` units (per head if balanced)."""
        return Columns(keep, self.groups, self.balance)

    def stays(self, kept: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Boolean form of `members`: the indices that are kept with the units `kept`."""
        is_kept = torch.zeros(self.units, dtype=torch.bool, device="cpu")
        is_kept[kept] = True
        return {
            name: (axis, is_kept[labels.clamp(min=0)] | (labels < 0))
            for name, (axis, labels) in self.members.items()
        }


@dataclass(frozen=True)
class Coupling:
    """Declaration of channels that can be removed from a block.

    Parameters
    ----------
    name
        Name for users: ``"mlp"``, ``"inner"``, ``"heads"``, ``"values"``.
    consumers
        Linears whose columns are the channels. Channels are chosen on the last one, the
        main consumer.
    producers
        Modules or parameters whose leading axis holds the channels.
    unit
        ``"channel"``: every channel on its own. ``"head"``: a head of keys and values
        with its query heads. ``"value"``: a channel of the values of such a head, which
        every query head of the group reads at the same position.
    stretches
        Number of copies of the channels, one after the other, by the name of a producer.
    head_dim
        Attribute of a module of the block with the size of a head.
    stock
        Fields of the stock configuration with the width, and the quantity that each
        counts; empty if the stock format does not allow another width.
    attributes
        Attributes that ``forward`` reads from modules of the block, and the quantity that
        each counts.
    bias
        The flag that gives the main consumer a bias; None if it has one without a flag,
        or if the stock format does not allow one.
    """

    name: str
    consumers: tuple[str, ...]
    producers: tuple[str, ...]
    unit: Literal["channel", "head", "value"] = "channel"
    stretches: Mapping[str, int] = field(default_factory=dict)
    head_dim: str | None = None
    stock: Mapping[str, Count] = field(default_factory=dict)
    attributes: Mapping[str, Count] = field(default_factory=dict)
    bias: BiasFlag | None = None

    def resolve(self, block: nn.Module, block_name: str = "block") -> Channels:
        """Channels of a block.

        Raises
        ------
        UnsupportedModelError
            If the block does not have the declared structure.
        """
        for name in self.consumers:
            if not _is_plain_linear(_find(block, name)):
                raise UnsupportedModelError(
                    self._expected("a Linear", block, name, block_name)
                )
        parameters = {
            name: (axis, parameter)
            for member in (*self.producers, *self.consumers)
            for name, axis, parameter in self._parameters(block, member, block_name)
        }
        main = f"{self.consumers[-1]}.weight"
        units = self._units(block, parameters, block_name)
        members: dict[str, tuple[int, Tensor]] = {}
        cost = 0
        for name, (axis, parameter) in parameters.items():
            size = parameter.shape[axis]
            labels = self.labels(block, name, axis, size, units)
            if labels is None:
                message = (
                    f"{block_name}.{name} has {size} entries along axis {axis}, which do "
                    f"not divide into the {units} units of {self.name!r}: choose other "
                    f"channels"
                )
                raise UnsupportedModelError(message)
            members[name] = (axis, labels)
            cost += parameter.numel() // units
        balance = None
        if self.unit == "value":
            balance = torch.arange(units, device="cpu") // self._head_dim(block)
        return Channels(self.name, units, members[main][1], balance, members, cost)

    def counts(self, block: nn.Module, channels: Channels, units: int) -> dict[Count, int]:
        """Values of the configuration and the attributes when `units` units are kept."""
        if self.unit == "channel":
            return {"units": units}
        size = self._head_dim(block)
        query_heads = len(channels.groups) // channels.units // size * units
        return {"units": units, "query_heads": query_heads, "head_dim": size}

    def _parameters(
        self, block: nn.Module, member: str, block_name: str
    ) -> list[tuple[str, int, nn.Parameter]]:
        """Name, axis of the channels and value of every parameter of a member."""
        axis = 1 if member in self.consumers else 0
        owner = _find(block, member)
        if isinstance(owner, nn.Parameter):
            return [(member, axis, owner)]
        if axis == 0 and not (_is_plain_linear(owner) or _is_depthwise(owner)):
            expected = "a Linear, a depthwise Conv1d or a parameter"
            raise UnsupportedModelError(self._expected(expected, block, member, block_name))
        assert isinstance(owner, nn.Module)
        own = owner.named_parameters(recurse=False)
        return [(f"{member}.{n}", axis, p) for n, p in own if n == "weight" or axis == 0]

    def _units(
        self,
        block: nn.Module,
        parameters: Mapping[str, tuple[int, nn.Parameter]],
        block_name: str,
    ) -> int:
        """Number of channels, of heads of keys and values, or of channels of values."""
        if self.unit == "channel":
            return parameters[f"{self.consumers[-1]}.weight"][1].shape[1]
        if _find(block, self.head_dim or "") is None:
            message = (
                f"no attribute {block_name}.{self.head_dim} with the size of a head: use a "
                f"version of transformers that has it"
            )
            raise UnsupportedModelError(message)
        values = parameters[f"{self.producers[-1]}.weight"][1].shape[0]
        return values if self.unit == "value" else max(values // self._head_dim(block), 1)

    def labels(
        self, block: nn.Module, name: str, axis: int, size: int, units: int
    ) -> Tensor | None:
        """Unit of each index of an axis with `size` entries; None if they do not divide."""
        index = torch.arange(size, device="cpu")
        if self.unit == "channel":
            times = self.stretches.get(name.rpartition(".")[0], 1)
            return index % units if size == times * units else None
        width = self._head_dim(block)
        if self.unit == "head":
            return index // (size // units) if size % (units * width) == 0 else None
        if size % units or units % width:
            return None
        if axis == 0:  # rows of the values
            return index
        return index // (size // units * width) * width + index % width

    def _head_dim(self, block: nn.Module) -> int:
        value = _find(block, self.head_dim or "")
        assert isinstance(value, int)
        return value

    def _expected(self, what: str, block: nn.Module, name: str, block_name: str) -> str:
        found = _find(block, name)
        kind = "nothing" if found is None else type(found).__name__
        return f"channels {self.name!r} need {what} at {block_name}.{name}, found {kind}"


def _find(block: nn.Module, name: str) -> object:
    """Module, parameter or attribute by its dotted name; None if there is none."""
    value: object = block
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def _is_plain_linear(module: object) -> bool:
    """Whether a module is a linear layer that stores its weight as (out, in)."""
    return isinstance(module, nn.Linear) and is_linear(module)


def _is_depthwise(module: object) -> bool:
    return isinstance(module, nn.Conv1d) and (
        module.groups == module.in_channels == module.out_channels
    )

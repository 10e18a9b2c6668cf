"""All cuts of one call: checked together, then applied.

Every parameter keeps some indices of some of its axes. Several couplings may share a
parameter, as heads and values share the output projection. It then keeps the indices that
all of them keep.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.adapters import Adapter, Channels, Coupling, get_coupling
from layerwise.errors import UnsupportedModelError, UsageError
from layerwise.run.models.narrow import GatheredLinear, ScatteredLinear
from layerwise.run.models.rewrite import (
    check_attribute,
    replace_parameter,
    synchronise,
    update_attributes,
)
from layerwise.run.models.stock import Shapes

Step = dict[str, dict[str, list[int]]]  # block -> coupling -> units that were kept


@dataclass(frozen=True)
class Cut:
    """Units of one coupling that are kept in one block.

    Parameters
    ----------
    block
        Full name of the block.
    coupling
        Name of the coupling.
    kept
        Indices of the kept units, shape (kept,), increasing.
    """

    block: str
    coupling: str
    kept: Tensor


class CutPlan:
    """All cuts of a call, checked; the model is not changed before :meth:`apply`."""

    def __init__(self, model: Any, adapter: Adapter, cuts: list[Cut]) -> None:
        self._model = model
        self._blocks = adapter.blocks_of(model)
        self._cuts: dict[tuple[str, str], list[int]] = {}
        self._units: list[tuple[str, Coupling, Channels, int]] = []
        self._kept: dict[str, dict[int, Tensor]] = {}  # parameter -> axis -> mask
        self._narrow: dict[str, dict[int, Tensor]] = {}  # the same, for values
        self.widths: dict[str, dict[str, int]] = {
            coupling.name: {
                name: coupling.resolve(block, name).units
                for name, block in self._blocks.items()
            }
            for coupling in adapter.couplings
            if coupling.unit != "value"
        }
        for cut in cuts:
            self._add(cut, get_coupling(adapter, cut.coupling))
        self._refuse_shared()
        self._refuse_empty()

    def _add(self, cut: Cut, coupling: Coupling) -> None:
        if cut.block not in self._blocks:
            message = (
                f"the model has no block {cut.block!r}: choose one of "
                f"{', '.join(self._blocks)}"
            )
            raise UsageError(message)
        if (cut.block, cut.coupling) in self._cuts:
            message = f"{cut.block} has two cuts of {cut.coupling!r}: give only one"
            raise UsageError(message)
        block = self._blocks[cut.block]
        channels = coupling.resolve(block, cut.block)
        kept = _checked(cut, channels)
        for name in coupling.attributes:
            check_attribute(block, cut.block, name)
        self._cuts[cut.block, cut.coupling] = kept.tolist()
        masks = self._kept if coupling.unit != "value" else self._narrow
        for name, (axis, mask) in channels.stays(kept).items():
            axes = masks.setdefault(f"{cut.block}.{name}", {})
            axes[axis] = axes[axis] & mask if axis in axes else mask
        if coupling.unit != "value":
            self.widths[cut.coupling][cut.block] = len(kept)
            self._units.append((cut.block, coupling, channels, len(kept)))

    def _refuse_shared(self) -> None:
        users: dict[int, list[str]] = {}
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if parameter.numel():
                users.setdefault(_identity(parameter), []).append(name)
        for name in (*self._kept, *self._narrow):
            shared = users[_identity(self._model.get_parameter(name))]
            if len(shared) > 1:
                other = next(user for user in shared if user != name)
                message = (
                    f"{name} and {other} are one tensor: channels cannot be removed from "
                    f"only one of them"
                )
                raise UnsupportedModelError(message)

    def _refuse_empty(self) -> None:
        for name in self._narrow:
            if not all(len(index) for index in self._indices(name).values()):
                message = f"{name}: the kept heads keep none of their values; keep some"
                raise UsageError(message)

    def _indices(self, name: str) -> dict[int, Tensor]:
        """Kept indices of a parameter: axis -> indices."""
        kept: dict[int, Tensor] = {}
        for masks in (self._kept, self._narrow):
            for axis, mask in masks.get(name, {}).items():
                kept[axis] = kept[axis] & mask if axis in kept else mask
        return {axis: mask.nonzero()[:, 0] for axis, mask in kept.items()}

    def shapes(self) -> Shapes:
        """Shape of every parameter of the model after the cuts."""
        shapes: Shapes = {}
        for name, parameter in self._model.named_parameters():
            shape = list(parameter.shape)
            for axis, index in self._indices(name).items():
                shape[axis] = len(index)
            shapes[name] = tuple(shape)
        return shapes

    def step(self) -> Step:
        """Record of the cuts."""
        step: Step = {}
        for (block, coupling), kept in self._cuts.items():
            step.setdefault(block, {})[coupling] = kept
        return step

    @torch.no_grad()
    def apply(self) -> None:
        """Replace the parameters one by one, and all attributes that give their sizes."""
        for block, coupling, channels, units in self._units:
            update_attributes(self._blocks[block], block, coupling, channels, units)
        names = {**self._kept, **self._narrow}
        for name in names:
            value = self._model.get_parameter(name).detach()
            for axis, index in self._indices(name).items():
                value = value.index_select(axis, index.to(value.device))
            replace_parameter(self._model, name, value)
        for name in names:
            synchronise(self._model.get_submodule(name.rpartition(".")[0]))
        for name in self._narrow:
            self._keep_positions(name)

    def _keep_positions(self, name: str) -> None:
        """Let a layer write or read narrower values at their former positions."""
        module, _, own = name.rpartition(".")
        if own != "weight":
            return
        ((axis, mask),) = self._narrow[name].items()
        wide = self._kept.get(name, {}).get(axis, torch.ones_like(mask))
        index = mask[wide].nonzero()[:, 0]
        width = int(wide.sum())
        if len(index) < width:
            kind = ScatteredLinear if axis == 0 else GatheredLinear
            linear = self._model.get_submodule(module)
            self._model.set_submodule(module, kind(linear, index, width))


def _checked(cut: Cut, channels: Channels) -> Tensor:
    """Kept units of a cut, on the CPU."""
    kept = cut.kept.detach().cpu()
    where = f"the cut of {cut.coupling!r} in {cut.block}"
    if kept.dim() != 1 or kept.is_floating_point() or kept.dtype == torch.bool:
        message = (
            f"{where} has kept of shape {tuple(kept.shape)} and type {kept.dtype}: give "
            f"the indices of the kept units, mask.nonzero()[:, 0]"
        )
        raise UsageError(message)
    kept = kept.long()
    if not len(kept) or not bool((kept.diff() > 0).all()):
        message = f"{where} must keep at least one unit: give increasing indices, each once"
        raise UsageError(message)
    if int(kept[0]) < 0 or int(kept[-1]) >= channels.units:
        message = (
            f"{where} keeps units {int(kept[0])} to {int(kept[-1])}: choose from 0 to "
            f"{channels.units - 1}"
        )
        raise UsageError(message)
    return kept


def _identity(parameter: Tensor) -> int:
    return id(parameter) if parameter.is_meta else parameter.data_ptr()

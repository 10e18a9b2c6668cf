"""What is reconstructed at a time: a matrix, attention or the MLP, or the whole block.

A unit has linears, and an *exit*: the module whose output should be that of the dense
model. The dense output of a unit is what the block would compute there if this unit, and
no other, had its dense modules. So the same few lines serve matrices, parts and blocks of
every architecture, whether a part is a module of its own (``mlp``) or not (``fc1`` and
``fc2`` of OPT).

Reference: arXiv:2510.14444 compares these granularities and finds attention and MLP on
their own the best.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layerwise.adapters import Stage
from layerwise.recovery.trainable import is_norm
from layerwise.run.activations.streams import Call

Objective = Literal["tokens", "block", "parts", "matrix"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)


@dataclass(frozen=True)
class Unit:
    """Something to reconstruct.

    Parameters
    ----------
    name
        Relative to the block; empty for the block.
    modules
        Submodules that are trained here, and dense for the target.
    exit
        Submodule whose output counts; None: the block's.
    """

    name: str
    modules: tuple[str, ...]
    exit: str | None


class _Seen(Exception):
    """Ends a forward pass at the exit."""


def units_of(
    block: nn.Module,
    stages: Sequence[Stage],
    objective: str,
    call: Call,
    hidden: Tensor,
    device: torch.device,
) -> list[Unit]:
    """Units of a block, in the order of the data flow.

    Parameters
    ----------
    block, stages
        The block and its linears.
    objective
        ``"block"``, ``"parts"`` or ``"matrix"``.
    call, hidden, device
        How to run it once, to see which norm belongs to which part.
    """
    if objective == "block":
        return [Unit("", ("",), None)]
    if objective == "matrix":
        return [
            Unit(name, (name,), None if stage.source else name)  # else it is never called
            for stage in stages
            for name in stage.linears
        ]
    parts = _parts(stages)
    units = [
        Unit(part, (part,), part) if part else Unit(names[-1], tuple(names), names[-1])
        for part, names in parts.items()
    ]
    norms = _norms_before(block, units, call, hidden, device)
    return [replace(unit, modules=(*unit.modules, *norms[unit.name])) for unit in units]


def count_units(stages: Sequence[Stage], objective: str) -> int:
    """Number of units of a block."""
    if objective == "block":
        return 1
    if objective == "parts":
        return len(_parts(stages))
    return sum(len(stage.linears) for stage in stages)


def _parts(stages: Sequence[Stage]) -> dict[str, list[str]]:
    """Linears by the child of the block that holds them; its own children together."""
    parts: dict[str, list[str]] = {}
    for stage in stages:
        for name in stage.linears:
            parts.setdefault(name.partition(".")[0] if "." in name else "", []).append(name)
    return parts


@torch.no_grad()
def _norms_before(
    block: nn.Module,
    units: Sequence[Unit],
    call: Call,
    hidden: Tensor,
    device: torch.device,
) -> Mapping[str, list[str]]:
    """Norms outside the parts, by the part whose exit comes next."""
    order: list[str] = []
    exits = {unit.exit: unit.name for unit in units if unit.exit is not None}
    inside = tuple(f"{module}." for unit in units for module in unit.modules)
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in block.named_modules()
        if name in exits or (is_norm(module) and not name.startswith(inside))
    ]
    try:
        call.run(block, hidden, device)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[str]] = {unit.name: [] for unit in units}
    waiting: list[str] = []
    for name in order:
        if name in exits:
            found[exits[name]] += waiting
            waiting = []
        else:
            waiting.append(name)
    return found


@torch.no_grad()
def dense_output(
    block: nn.Module,
    dense: nn.Module,
    unit: Unit,
    call: Call,
    hidden: Tensor,
    device: torch.device,
) -> Tensor:
    """Output at the exit of a unit if its modules were dense, and no others."""
    if unit.modules == ("",):
        return output_at(dense, unit.exit, call, hidden, device)
    with _swapped(block, unit.modules, dense):
        return output_at(block, unit.exit, call, hidden, device)


@contextmanager
def _swapped(block: nn.Module, modules: Sequence[str], dense: nn.Module) -> Iterator[None]:
    """Hold the modules of the dense block in a block."""
    own = {name: block.get_submodule(name) for name in modules}
    try:
        for name in modules:
            block.set_submodule(name, dense.get_submodule(name))
        yield
    finally:
        for name, module in own.items():
            block.set_submodule(name, module)


def output_at(
    block: nn.Module, exit: str | None, call: Call, hidden: Tensor, device: torch.device
) -> Tensor:
    """Output of a block, or of one of its submodules, which ends the pass."""
    if exit is None:
        return call.run(block, hidden, device)
    seen: list[Tensor] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple | list) else output)
        raise _Seen

    handle = block.get_submodule(exit).register_forward_hook(look)
    try:
        with suppress(_Seen):
            call.run(block, hidden, device)
    finally:
        handle.remove()
    return seen[0]

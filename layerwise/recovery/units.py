"""Units of a reconstruction: a matrix, attention or the MLP, or the whole block.

A *unit* is a group of modules that are retrained together. Its *exit* is the module whose
output should equal the dense output. The dense output of a unit is computed by the block
with the dense modules of this unit, and of no other unit. This serves matrices, parts and
blocks of every architecture, whether a part is one module (``mlp``) or several (``fc1`` and
``fc2`` of OPT).

Reference: arXiv:2510.14444 compares these granularities and finds that separate units for
attention and MLP are the best.
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
    """Modules of a block that are retrained together.

    Parameters
    ----------
    name
        Name relative to the block; empty for the block.
    modules
        Submodules to train; their dense versions compute the target.
    exit
        Submodule whose output is compared; None: the block itself.
    """

    name: str
    modules: tuple[str, ...]
    exit: str | None


class _ExitReached(Exception):
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
        Arguments of one forward pass, which shows which norm belongs to which part.
    """
    if objective == "block":
        return [Unit("", ("",), None)]
    if objective == "matrix":
        return [
            # a linear of a stage with a source is never called, so it has no output
            Unit(name, (name,), None if stage.source else name)
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
    """Linears grouped by the submodule of the block that holds them; "" for the block."""
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
    norms: dict[str, list[str]] = {unit.name: [] for unit in units}
    waiting: list[str] = []
    for name in order:
        if name in exits:
            norms[exits[name]] += waiting
            waiting = []
        else:
            waiting.append(name)
    return norms


@torch.no_grad()
def dense_output(
    block: nn.Module,
    dense: nn.Module,
    unit: Unit,
    call: Call,
    hidden: Tensor,
    device: torch.device,
) -> Tensor:
    """Output at the exit of a unit when only its modules are dense."""
    if unit.modules == ("",):
        return output_at(dense, unit.exit, call, hidden, device)
    with _swapped(block, unit.modules, dense):
        return output_at(block, unit.exit, call, hidden, device)


@contextmanager
def _swapped(block: nn.Module, modules: Sequence[str], dense: nn.Module) -> Iterator[None]:
    """Replace some modules of a block by those of the dense block."""
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
    """Output of a block, or of a submodule at which the forward pass ends."""
    if exit is None:
        return call.run(block, hidden, device)
    outputs: list[Tensor] = []

    def keep_output(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple | list) else output)
        raise _ExitReached

    handle = block.get_submodule(exit).register_forward_hook(keep_output)
    try:
        with suppress(_ExitReached):
            call.run(block, hidden, device)
    finally:
        handle.remove()
    return outputs[0]

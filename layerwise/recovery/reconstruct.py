r"""Reconstruction: train a block, its parts or its matrices to the dense outputs.

Blocks are taken in order. With theta the trained parameters of a unit, and Xhat its inputs
from the pruned and reconstructed blocks before it, the problem is

    min over theta of  ||f_dense(X) - f_theta(Xhat)||^2 / ||f_dense(X)||^2

``sequential``, as published, compares on equal inputs, X = Xhat. ``full`` takes X from the
dense model, and so also corrects the errors of the blocks before. One block at a time is on
the device, in float32, with the optimizer state of one unit.

References
----------
.. [1] M. Zimmer, M. Andoni, C. Spiegel, S. Pokutta, "PERP: Rethinking the Prune-Retrain
   Paradigm in the Era of LLMs", arXiv:2312.15230, section 2.3.
.. [2] arXiv:2510.14444, on the size of what is reconstructed at a time.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters import Stage
from layerwise.errors import UsageError
from layerwise.recovery.records import UnitRecord
from layerwise.recovery.trainable import HALF, ParameterSets, Trainable, in_float32
from layerwise.recovery.training import OnStep, State, Training, split, train
from layerwise.recovery.units import Unit, dense_output, output_at, units_of
from layerwise.run.activations.streams import Call
from layerwise.run.pipeline.matrix import naming

MODES = ("sequential", "full")


@dataclass(frozen=True)
class Reconstruction:
    """Settings for the reconstruction of every block.

    Parameters
    ----------
    sets, training
        Parameter sets, and how they are trained.
    objective
        ``"block"``, ``"parts"`` or ``"matrix"``.
    mode
        ``"sequential"`` or ``"full"``.
    device
        Where to compute.
    """

    sets: ParameterSets
    training: Training
    objective: str
    mode: str
    device: torch.device

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            message = (
                f"error_correction of a reconstruction must be one of {', '.join(MODES)}, "
                f"got {self.mode!r}"
            )
            raise UsageError(message)


@dataclass
class RetrainedBlock:
    """New values of parameters by their name in the block, and the records."""

    values: dict[str, Tensor] = field(default_factory=dict)
    records: list[UnitRecord] = field(default_factory=list)


@dataclass(frozen=True)
class Pair:
    """A pruned block, its dense block, their masks, and the inputs of both by batch."""

    name: str
    block: nn.Module
    dense: nn.Module
    stages: Sequence[Stage]
    masks: Mapping[str, Tensor]  # by parameter name inside the block
    calls: Sequence[Call]
    inputs: Sequence[Tensor]
    dense_inputs: Sequence[Tensor]  # the same object where the mode is sequential


def reconstruct_block(
    task: Reconstruction,
    pair: Pair,
    on_step: OnStep = lambda rate, step, loss: None,
    on_unit: Callable[[UnitRecord], None] = lambda record: None,
) -> RetrainedBlock:
    """Retrain a block in place, unit by unit.

    Parameters
    ----------
    task, pair
        Settings and blocks; both blocks are on the task's device.
    on_step, on_unit
        Called after every step and every unit.
    """
    result = RetrainedBlock()
    with in_float32(pair.block), in_float32(pair.dense):
        calls = [_as_float32(call) for call in pair.calls]
        inputs = [hidden.float() for hidden in pair.inputs]
        same = pair.dense_inputs is pair.inputs
        dense_inputs = inputs if same else [hidden.float() for hidden in pair.dense_inputs]
        units = units_of(
            pair.block, pair.stages, task.objective, calls[0], inputs[0], task.device
        )
        for unit in units:
            full_name = ".".join(part for part in (pair.name, unit.name) if part)
            with naming(full_name):
                values, record = _retrain_unit(
                    task, pair, unit, calls, inputs, None if same else dense_inputs, on_step
                )
            result.values |= values
            result.records.append(replace(record, name=full_name))
            on_unit(result.records[-1])
    own = dict(pair.block.named_parameters())
    result.values = {name: own[name].detach().cpu().clone() for name in result.values}
    return result


def _retrain_unit(
    task: Reconstruction,
    pair: Pair,
    unit: Unit,
    calls: Sequence[Call],
    inputs: Sequence[Tensor],
    dense_inputs: Sequence[Tensor] | None,
    on_step: OnStep,
) -> tuple[dict[str, Tensor], UnitRecord]:
    start = time.perf_counter()
    block, device = pair.block, task.device
    targets = []
    for index, (call, hidden) in enumerate(zip(calls, inputs, strict=True)):
        if dense_inputs is None:
            target = dense_output(block, pair.dense, unit, call, hidden, device)
        else:
            with torch.no_grad():
                target = output_at(pair.dense, unit.exit, call, dense_inputs[index], device)
        targets.append(target.cpu())
    energy = sum(float(target.square().sum()) for target in targets) / len(targets)
    energy = energy or 1.0
    learn, held_out = split(len(calls))

    def error_of(index: int) -> Tensor:
        hidden = inputs[index].to(device)
        output = output_at(block, unit.exit, calls[index], hidden, device)
        return (output - targets[index].to(output.device)).square().sum() / energy

    @torch.no_grad()
    def held_out_error() -> float:
        return math.sqrt(sum(float(error_of(i)) for i in held_out) / len(held_out))

    trainable = Trainable(
        block, task.sets, pair.masks, scope=unit.modules, seed=task.training.seed
    )
    try:
        before = held_out_error()
        state = train(
            trainable,
            error_of,
            held_out_error,
            learn,
            task.training,
            state=State(best=before),
            on_step=on_step,
        )
    except BaseException:
        trainable.release()
        raise
    trained = trainable.n_parameters
    values: dict[str, Tensor] = {}
    if state.best_rate is None:
        trainable.set_values()
        trainable.release()
        after = before
    else:
        values = trainable.merge()
        after = held_out_error()
    record = UnitRecord(
        name=unit.name,
        trained=trained,
        before=before,
        after=after,
        learning_rate=state.best_rate,
        steps=task.training.steps,
        losses=tuple(state.losses),
        seconds=time.perf_counter() - start,
    )
    return values, record


def _as_float32(call: Call) -> Call:
    return Call(_to_float32(call.args), _to_float32(call.kwargs))


def _to_float32(value: Any) -> Any:
    """Convert half-precision tensors inside tuples, lists and mappings to float32."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in HALF else value
    if isinstance(value, tuple | list):
        return type(value)(_to_float32(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _to_float32(item) for key, item in value.items()}
    return value

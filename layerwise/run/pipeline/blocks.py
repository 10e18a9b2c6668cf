"""Output of a block, and moments of its stages.

Error correction decides which inputs pose the problem of a layer (X from the dense model,
Xhat from the pruned one):

====================  ====================================================================
``none``              X = Xhat = dense inputs everywhere
``sequential``        X = Xhat = output of the pruned blocks before; dense inside the block
``block``             the block starts from dense inputs; inside it X dense, Xhat pruned
``full``              X through the dense model, Xhat through the pruned one, all the way
====================  ====================================================================

With ``none`` and ``block`` the blocks are independent of each other.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.adapters import Stage
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.pruned_side import PrunedSide
from layerwise.run.activations.streams import Tap, block_outputs, visit_inputs
from layerwise.run.pipeline.matrix import naming
from layerwise.run.pipeline.task import Task
from layerwise.run.pipeline.trim import trim_memory
from layerwise.run.steps import status
from layerwise.run.stopwatch import timed

PART_TOKENS = 2048  # added to the moments at one time on the CPU


def advance(task: Task, inputs: BlockInputs, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
    """Output of the block with its current weights, batch by batch."""
    return _timed_passes(block_outputs(inputs.block, inputs.calls, hidden, task.device))


def advance_dense(
    task: Task, inputs: BlockInputs, side: DenseSide | None
) -> Iterator[Tensor]:
    """Output of the dense block, before any of its weights is written."""
    if side is None:
        return advance(task, inputs, inputs.dense)
    return _timed_passes(side.advance())


def _timed_passes(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Batches, with the time to compute them counted as forward passes."""
    while True:
        with timed("forward"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def collect_at_once(task: Task, inputs: BlockInputs) -> list[MomentAccumulator]:
    """Moments of all stages from one pass through the dense block."""
    if not inputs.stages:
        return []
    accumulators = [_accumulator(task, inputs, stage) for stage in inputs.stages]
    taps = [
        Tap(stage, _named_update(inputs, stage, accumulator))
        for stage, accumulator in zip(inputs.stages, accumulators, strict=True)
    ]
    visits = visit_inputs(
        inputs.block, taps, inputs.calls, inputs.pruned, task.device, inputs.name, stop=True
    )
    status(f"collecting the inputs of {inputs.name}")
    with timed("forward"):
        for _ in visits:
            pass
    return accumulators


def _named_update(
    inputs: BlockInputs, stage: Stage, accumulator: MomentAccumulator
) -> Callable[..., None]:
    def update(*batches: Tensor) -> None:
        with naming(f"{inputs.name}.{stage.linears[0]}"), timed("gram"):
            for parts in zip(*map(_in_parts, batches), strict=True):
                accumulator.update(*parts)

    return update


def _in_parts(batch: Tensor) -> tuple[Tensor, ...]:
    """Split a batch by sequences on the CPU, where copies of it cost memory."""
    if batch.device.type != "cpu":
        return (batch,)
    length = batch.shape[-2] if batch.dim() > 2 else 1
    return torch.split(batch, max(1, PART_TOKENS // length))


def collect_pair(
    task: Task,
    inputs: BlockInputs,
    dense: DenseSide,
    pruned: PrunedSide | None,
    stage: Stage,
) -> MomentAccumulator:
    """Moments of one stage from the dense and the partly pruned block in parallel.

    `pruned` is None if both give the same inputs.
    """
    accumulator = _accumulator(task, inputs, stage)
    trim_memory(inputs.weight(task.adapter, stage.linears[0]).shape[1])
    update = _named_update(inputs, stage, accumulator)
    status(f"collecting the inputs of {inputs.name}.{stage.linears[0]}")
    with timed("forward"):
        seen = dense.inputs_of(stage)
        if pruned is None:
            for batch in seen:
                update(batch)
        else:
            for batches in zip(seen, pruned.inputs_of(stage), strict=True):
                update(*batches)
    return accumulator


def _accumulator(task: Task, inputs: BlockInputs, stage: Stage) -> MomentAccumulator:
    weights = [inputs.weight(task.adapter, name) for name in stage.linears]
    width = weights[0].shape[1]
    return MomentAccumulator(
        width,
        weights if task.staged else [],
        task.device,
        fluctuation="fluctuation" in task.statistics,
    )

"""Block by block: capture inputs, accumulate moments, solve, write back, advance.

Error correction decides which inputs make the problem of a layer (X from the dense model,
Xhat from the pruned one):

====================  ====================================================================
``none``              X = Xhat = dense inputs everywhere
``sequential``        X = Xhat = inputs behind the pruned blocks; dense inside the block
``block``             the block starts from dense inputs; inside it X dense, Xhat pruned
``full``              X through the dense model, Xhat through the pruned one, all the way
====================  ====================================================================

With ``none`` and ``block`` the blocks are independent of each other, and
:func:`prune_block` is a pure function of a block and its inputs.

Where several ranks share a run, each has seen a part of the tokens. Their sums are added
up, and every matrix is solved by one rank and given to the others.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.adapters import Stage
from layerwise.moments import Moments
from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.pruned_side import PrunedSide
from layerwise.run.activations.streams import Tap, behind, visit_inputs
from layerwise.run.pipeline.allocator import trim_memory
from layerwise.run.pipeline.matrix import SolvedMatrix, naming, solve_matrix
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.task import Task
from layerwise.run.stopwatch import timed
from layerwise.run.workers.ranks import Ranks, owners
from layerwise.solve import steps_of
from layerwise.solver import requirements

PART_TOKENS = 512  # that moments are made of at a time on the CPU


def prune_block(
    task: Task,
    inputs: BlockInputs,
    on_layer: OnLayer = lambda record: None,
    side: DenseSide | None = None,
) -> PrunedBlock:
    """Prune the target linears of a block in place.

    Parameters
    ----------
    task
        Method, pattern and error correction.
    inputs
        The block, already on the task's device.
    on_layer
        Called after every matrix.
    """
    result = PrunedBlock()
    if not task.staged:
        accumulators = collect_at_once(task, inputs)
        seen = list(zip(inputs.stages, accumulators, strict=True))
        # ranks find more to divide in a block than in a stage
        parts = [seen] if task.ranks.are_several else [[one] for one in seen]
        for part in parts:
            _solve_stages(task, inputs, part, result, on_layer)
        return result
    dense = side or task.dense_side(inputs)
    pruned = PrunedSide(inputs, task.device, dense)
    for index, stage in enumerate(inputs.stages):
        same = index == 0 and inputs.pruned is inputs.dense
        accumulator = collect_pair(task, inputs, dense, None if same else pruned, stage)
        dense.forget(stage)
        _solve_stages(task, inputs, [(stage, accumulator)], result, on_layer)
        with timed("forward"):
            pruned.settle(stage)
    return result


def advance(task: Task, inputs: BlockInputs, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
    """Hidden states behind the block as it is now, batch by batch."""
    return _timed_passes(behind(inputs.block, inputs.calls, hidden, task.device))


def advance_dense(
    task: Task, inputs: BlockInputs, side: DenseSide | None
) -> Iterator[Tensor]:
    """Hidden states behind the dense block, before anything in it is written."""
    if side is None:
        return advance(task, inputs, inputs.dense)
    return _timed_passes(side.advance())


def _timed_passes(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Batches, what it takes to make them counted as forward passes."""
    while True:
        with timed("forward"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def collect_at_once(task: Task, inputs: BlockInputs) -> list[MomentAccumulator]:
    """Moments of all stages from one pass through the dense block."""
    accumulators = [_accumulator(task, inputs, stage) for stage in inputs.stages]
    taps = [
        Tap(stage, _named_update(inputs, stage, accumulator))
        for stage, accumulator in zip(inputs.stages, accumulators, strict=True)
    ]
    visits = visit_inputs(
        inputs.block, taps, inputs.calls, inputs.pruned, task.device, inputs.name, stop=True
    )
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
    """Sequences of a batch, some at a time on the CPU, where copies of them cost memory."""
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
    """Moments of one stage from the dense and the partly pruned block, side by side.

    `pruned` is None where both give the same.
    """
    accumulator = _accumulator(task, inputs, stage)
    update = _named_update(inputs, stage, accumulator)
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
    weights = [task.adapter.weight(inputs.block, name) for name in stage.linears]
    width = weights[0].shape[1]
    return MomentAccumulator(
        width,
        weights if task.staged else [],
        task.device,
        fluctuation=any("fluctuation" in requirements(s) for s in steps_of(task.solver)),
    )


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix whose moments are known, and what makes its problem."""

    linear: str
    weight: Tensor
    pose: Callable[[], LayerProblem]


def _solve_stages(
    task: Task,
    inputs: BlockInputs,
    stages: Sequence[tuple[Stage, MomentAccumulator]],
    result: PrunedBlock,
    on_layer: OnLayer,
) -> None:
    """Solve the problems of some stages and write the weights."""
    matrices = [
        matrix
        for stage, accumulator in stages
        for matrix in _matrices(task, inputs, stage, accumulator)
    ]
    for matrix, solved in _solutions(task, inputs.name, matrices):
        name = matrix.linear
        matrix.weight.copy_(solved.weight)  # last: the problem reads the dense weight
        result.weights[name] = matrix.weight.cpu()  # on the CPU the layer's own, no copy
        result.masks[name] = solved.mask.cpu()
        result.records.append(solved.record)
        trim_memory(matrix.weight.shape[1])  # before the next matrix needs it
        on_layer(solved.record)


def _matrices(
    task: Task, inputs: BlockInputs, stage: Stage, accumulator: MomentAccumulator
) -> list[_Matrix]:
    """Matrices of a stage, which share their moments."""
    trim_memory(task.adapter.weight(inputs.block, stage.linears[0]).shape[1])
    with naming(f"{inputs.name}.{stage.linears[0]}"), timed("gram"):
        if task.ranks.are_several:
            accumulator.add_over(task.ranks.add)
        moments, exponent = accumulator.release()
    found = []
    for index, name in enumerate(stage.linears):
        weight = task.adapter.weight(inputs.block, name)
        drift = partial(accumulator.drift, index) if task.staged else lambda: None
        gradient = partial(_scaled, inputs.gradients.get(name), exponent, weight.device)
        pose = partial(_pose, task, weight, moments, drift, gradient)
        found.append(_Matrix(name, weight, pose))
    return found


def _solutions(
    task: Task, block: str, matrices: Sequence[_Matrix]
) -> Iterator[tuple[_Matrix, "SolvedMatrix"]]:
    """Matrices one by one, each when it is solved.

    With several ranks each solves its share first, then they tell each other.
    """
    ranks = task.ranks
    if not ranks.are_several:
        for matrix in matrices:
            yield matrix, solve_matrix(task, f"{block}.{matrix.linear}", matrix.pose)
        return
    # factorizations and sweeps: rows times the square of the width
    costs = [float(m.weight.numel() * m.weight.shape[1]) for m in matrices]
    by = owners(costs, ranks.size)
    own = {
        matrix.linear: solve_matrix(task, f"{block}.{matrix.linear}", matrix.pose)
        for matrix, owner in zip(matrices, by, strict=True)
        if owner == ranks.rank
    }
    for matrix, owner in zip(matrices, by, strict=True):
        with timed("exchange"):
            solved = _exchanged(
                ranks, owner, f"{block}.{matrix.linear}", matrix, own.get(matrix.linear)
            )
        yield matrix, solved


def _exchanged(
    ranks: Ranks, owner: int, name: str, matrix: _Matrix, own: "SolvedMatrix | None"
) -> "SolvedMatrix":
    """What the owner of a matrix has, on every rank."""
    text = None if own is None else json.dumps(own.record.to_dict())
    record = LayerRecord.from_dict(json.loads(ranks.tell(name, text)))
    if own is None:
        weight = torch.empty(
            matrix.weight.shape, dtype=matrix.weight.dtype, device=matrix.weight.device
        )
        mask = torch.empty_like(weight, dtype=torch.bool)
    else:
        weight, mask = own.weight.contiguous(), own.mask.contiguous()
    ranks.copy([weight, mask], owner)
    return SolvedMatrix(weight, mask, record)


def _pose(
    task: Task,
    weight: Tensor,
    moments: Moments,
    drift: Callable[[], Tensor | None],
    gradient_norm: Callable[[], Tensor | None],
) -> LayerProblem:
    """Problem of one matrix of a stage; what is large is made when it is needed."""
    assert isinstance(task.pattern, Pattern)
    return LayerProblem.from_moments(
        weight.contiguous(),  # solvers see one layout, however it is stored
        moments,
        pattern=task.pattern,
        damping=task.damping,
        drift=drift(),
        gradient_norm=gradient_norm(),
    )


def _scaled(norm: Tensor | None, exponent: int, device: torch.device) -> Tensor | None:
    """Gradient norms in the units of moments that were scaled by ``2^-exponent``."""
    return None if norm is None else norm.to(device).double() * 2.0 ** (-exponent // 2)

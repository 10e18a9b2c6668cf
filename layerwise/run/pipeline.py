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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layerwise.adapters import Adapter, Stage
from layerwise.errors import LayerwiseError
from layerwise.evaluate import relative_error
from layerwise.lower_bounds import MEMORY_BUDGET, proven_gap_of
from layerwise.moments import MomentAccumulator, Moments
from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem
from layerwise.run.allocator import trim_memory
from layerwise.run.data.calibration import Calibration
from layerwise.run.dense_side import DenseSide
from layerwise.run.outputs.records import LayerRecord
from layerwise.run.pruned_side import PrunedSide
from layerwise.run.smaller.structure import Structure
from layerwise.run.streams import Call, Tap, behind, visit_inputs
from layerwise.run.targets import Choice
from layerwise.run.timing.stopwatch import stage as timed
from layerwise.run.workers.ranks import ALONE, Ranks, owners
from layerwise.solution import Solution, requirements
from layerwise.solve import solve, solver_name, steps_of

ErrorCorrection = Literal["none", "sequential", "block", "full"]
ERROR_CORRECTIONS: tuple[str, ...] = get_args(ErrorCorrection)
PART_TOKENS = 512  # that moments are made of at a time on the CPU
OnLayer = Callable[[LayerRecord], None]  # told about every matrix that is done


@dataclass(frozen=True)
class Task:
    """What to do to every block.

    `certify` asks for the proven gap of every matrix, within `memory_budget` bytes; `ranks`
    share the work.
    """

    adapter: Adapter
    solver: Any
    pattern: Pattern | Structure
    damping: float
    error_correction: ErrorCorrection
    device: torch.device
    certify: bool = False
    memory_budget: int = MEMORY_BUDGET
    ranks: Ranks = ALONE

    @property
    def staged(self) -> bool:
        """Whether a stage sees the effect of the pruned stages before it."""
        return self.error_correction in ("block", "full")

    def prepared(self, model: nn.Module, selection: Choice, tokens: Calibration) -> "Task":
        """The task with all it must know of the whole model before the first block."""
        return self

    def dense_side(self, inputs: "BlockInputs") -> DenseSide:
        """The block as it is, for the inputs of the stages that will be pruned."""
        return DenseSide(self, inputs, inputs.stages)

    def prune(
        self, inputs: "BlockInputs", on_layer: OnLayer = lambda record: None
    ) -> "PrunedBlock":
        """Prune the target linears of a block in place, see :func:`prune_block`."""
        return prune_block(self, inputs, on_layer)


@dataclass
class PrunedBlock:
    """Result of one block: stored weights, masks and figures, by linear.

    `biases` holds those that a method changed or added.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def without_tensors(self) -> "PrunedBlock":
        """Its figures alone."""
        return PrunedBlock(records=self.records)


@dataclass(frozen=True)
class BlockInputs:
    """A block, its name, and what goes into it.

    `side` is what a pass through the dense block has kept; without one it is made anew.
    """

    name: str
    block: nn.Module
    stages: tuple[Stage, ...]  # linears to prune, in the order of the data flow
    calls: Sequence[Call]
    dense: Sequence[Tensor]  # hidden states of the dense model, per batch
    pruned: Sequence[Tensor]  # of the pruned model; the same object where there is one
    gradients: Mapping[str, Tensor] = field(default_factory=dict)  # norms, by linear
    side: DenseSide | None = None


def prune_block(
    task: Task,
    inputs: BlockInputs,
    on_layer: OnLayer = lambda record: None,
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
    dense = inputs.side or task.dense_side(inputs)
    pruned = PrunedSide(task, inputs, dense)
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


def advance_dense(task: Task, inputs: BlockInputs) -> Iterator[Tensor]:
    """Hidden states behind the dense block, before anything in it is written."""
    if inputs.side is None:
        return advance(task, inputs, inputs.dense)
    return _timed_passes(inputs.side.advance())


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


@dataclass(frozen=True, eq=False)
class SolvedMatrix:
    """One pruned matrix: stored weight and mask, (out, in), and its figures."""

    weight: Tensor
    mask: Tensor
    record: LayerRecord


def solve_matrix(task: Task, name: str, pose: Callable[[], LayerProblem]) -> SolvedMatrix:
    """Pose and solve the problem of one matrix, as a task says.

    Parameters
    ----------
    task
        Method and damping; whether to prove a gap.
    name
        Full name of the layer.
    pose
        Makes the problem. It counts for the time of the layer.
    """
    start = time.perf_counter()
    with naming(name), timed("solve"):
        problem = pose()
        trim_memory(problem.shape[1])
        solution = solve(problem, task.solver)
        stored = solution.weight.to(problem.weight.dtype)
        seconds = time.perf_counter() - start
        error = solution.relative_error
        if not torch.equal(stored.to(solution.weight.dtype), solution.weight):
            error = relative_error(problem, stored)
        record = record_of(task, name, problem, solution, stored, error, seconds)
    if task.certify:
        with naming(name), timed("certify"):
            record = certified(task, record, problem, stored)
    return SolvedMatrix(stored, solution.mask, record)


def record_of(
    task: Task,
    name: str,
    problem: LayerProblem,
    solution: Solution,
    stored: Tensor,
    error: float,
    seconds: float,
) -> LayerRecord:
    """Figures of a matrix, its error measured after the cast to the model's type."""
    damping = float(solution.stats.get("damping", task.damping))
    certificate = solution.certificate
    return LayerRecord(
        name=name,
        shape=problem.shape,
        method=solver_name(task.solver),
        pattern=str(task.pattern),
        sparsity=int((stored == 0).sum()) / stored.numel(),
        relative_error=error,
        status=str(solution.status),
        certificate=None if certificate is None else certificate.bound,
        certificate_kind=None if certificate is None else certificate.kind,
        damping=damping,
        damping_raised=damping > task.damping,
        rank=problem.moments.rank,
        dead_channels=problem.moments.dead_channels,
        n_tokens=problem.moments.n_tokens,
        iterations=solution.iterations,
        seconds=seconds,
    )


def certified(
    task: Task, record: LayerRecord, problem: LayerProblem, stored: Tensor
) -> LayerRecord:
    """Record with the proven gap of the stored weights, at the damping that was used."""
    used = problem.with_damping(record.damping)
    gap = proven_gap_of(used, stored, memory_budget=task.memory_budget)
    return replace(record, proven_gap=gap)


class naming:  # noqa: N801 - reads as a statement: with naming(layer)
    """Put the name of a layer in front of the errors raised inside."""

    def __init__(self, layer: str) -> None:
        self._layer = layer

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, LayerwiseError):
            message = f"{self._layer}: {error}"
            raise type(error)(message) from error

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
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layerwise.adapters import Adapter, Stage
from layerwise.errors import LayerwiseError
from layerwise.evaluate import relative_error
from layerwise.lower_bounds import MEMORY_BUDGET, proven_gap_of
from layerwise.moments import MomentAccumulator
from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem
from layerwise.run.allocator import trim_memory
from layerwise.run.calibration import Calibration
from layerwise.run.dense_side import DenseSide, inputs_of
from layerwise.run.records import LayerRecord
from layerwise.run.stopwatch import stage as timed
from layerwise.run.streams import Call, Tap, behind, visit_inputs
from layerwise.run.structure import Structure
from layerwise.run.targets import Choice
from layerwise.solution import Solution, requirements
from layerwise.solve import solve, solver_name, steps_of

ErrorCorrection = Literal["none", "sequential", "block", "full"]
ERROR_CORRECTIONS: tuple[str, ...] = get_args(ErrorCorrection)
OnLayer = Callable[[LayerRecord], None]  # told about every matrix that is done


@dataclass(frozen=True)
class Task:
    """What to do to every block.

    `certify` asks for the proven gap of every matrix, within `memory_budget` bytes.
    """

    adapter: Adapter
    solver: Any
    pattern: Pattern | Structure
    damping: float
    error_correction: ErrorCorrection
    device: torch.device
    certify: bool = False
    memory_budget: int = MEMORY_BUDGET

    @property
    def staged(self) -> bool:
        """Whether a stage sees the effect of the pruned stages before it."""
        return self.error_correction in ("block", "full")

    def prepared(self, model: nn.Module, selection: Choice, tokens: Calibration) -> "Task":
        """The task with all it must know of the whole model before the first block."""
        return self

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
    """A block, its name, and what goes into it."""

    name: str
    block: nn.Module
    stages: tuple[Stage, ...]  # linears to prune, in the order of the data flow
    calls: Sequence[Call]
    dense: Sequence[Tensor]  # hidden states of the dense model, per batch
    pruned: Sequence[Tensor]  # of the pruned model; the same object where there is one
    gradients: Mapping[str, Tensor] = field(default_factory=dict)  # norms, by linear


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
        for stage, accumulator in zip(inputs.stages, accumulators, strict=True):
            _solve_stage(task, inputs, stage, accumulator, result, on_layer)
        return result
    dense = DenseSide(task, inputs, inputs.stages)
    for index, stage in enumerate(inputs.stages):
        same = index == 0 and inputs.pruned is inputs.dense
        accumulator = collect_pair(task, inputs, dense, stage, same=same)
        _solve_stage(task, inputs, stage, accumulator, result, on_layer)
    return result


def advance(task: Task, inputs: BlockInputs, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
    """Hidden states behind the block as it is now, batch by batch."""
    batches = behind(inputs.block, inputs.calls, hidden, task.device)
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
            accumulator.update(*batches)

    return update


def collect_pair(
    task: Task, inputs: BlockInputs, dense: DenseSide, stage: Stage, *, same: bool
) -> MomentAccumulator:
    """Moments of one stage from the dense and the partly pruned block, side by side."""
    accumulator = _accumulator(task, inputs, stage)
    update = _named_update(inputs, stage, accumulator)
    with timed("forward"):
        seen = dense.inputs_of(stage)
        if same:
            for batch in seen:
                update(batch)
        else:
            pruned = inputs_of(task.device, inputs, inputs.block, stage, inputs.pruned)
            for batch, pruned_batch in zip(seen, pruned, strict=True):
                update(batch, pruned_batch)
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


def _solve_stage(
    task: Task,
    inputs: BlockInputs,
    stage: Stage,
    accumulator: MomentAccumulator,
    result: PrunedBlock,
    on_layer: OnLayer,
) -> None:
    """Solve the problems of a stage, which share their moments, and write the weights."""
    pattern = task.pattern
    assert isinstance(pattern, Pattern)
    trim_memory()
    with naming(f"{inputs.name}.{stage.linears[0]}"), timed("gram"):
        moments, exponent = accumulator.release()
    for index, name in enumerate(stage.linears):
        full_name = f"{inputs.name}.{name}"
        weight = task.adapter.weight(inputs.block, name)
        gradient_norm = inputs.gradients.get(name)
        if gradient_norm is not None:  # in the units of the moments
            scale = 2.0 ** (-exponent // 2)
            gradient_norm = gradient_norm.to(weight.device).double() * scale
        start = time.perf_counter()
        with naming(full_name), timed("solve"):
            problem = LayerProblem.from_moments(
                weight.contiguous(),  # solvers see one layout, however it is stored
                moments,
                pattern=pattern,
                damping=task.damping,
                drift=accumulator.drift(index) if task.staged else None,
                gradient_norm=gradient_norm,
            )
            solution = solve(problem, task.solver)
            stored = solution.weight.to(weight.dtype)
            seconds = time.perf_counter() - start
            error = solution.relative_error
            if not torch.equal(stored.to(solution.weight.dtype), solution.weight):
                error = relative_error(problem, stored)
            record = record_of(task, full_name, problem, solution, stored, error, seconds)
        if task.certify:
            with naming(full_name), timed("certify"):
                record = certified(task, record, problem, stored)
        weight.copy_(stored)  # last: the problem reads the dense weight
        result.weights[name], result.masks[name] = stored.cpu(), solution.mask.cpu()
        result.records.append(record)
        del problem, solution  # before the memory of the next ones is needed
        trim_memory()
        on_layer(record)


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
        sparsity=float((stored == 0).double().mean()),
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

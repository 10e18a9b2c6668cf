"""Stages of a block with known moments: solve their matrices and write the weights.

If several ranks share a run, each has seen a part of the tokens. Their sums are added up,
and every matrix is solved by one rank and broadcast to the others.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.adapters import Stage
from layerwise.moments import Moments
from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem
from layerwise.run.activations.block import BlockInputs
from layerwise.run.pipeline.matrix import SolvedMatrix, naming, solve_matrix
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.task import Task
from layerwise.run.pipeline.trim import trim_memory
from layerwise.run.stopwatch import timed
from layerwise.run.workers.ranks import Ranks, owners


class Zeros(Protocol):
    """Method and pattern of all matrices."""

    @property
    def method(self) -> Method:
        """Method that solves a matrix."""
        ...

    @property
    def pattern(self) -> Pattern:
        """Pattern of the matrices."""
        ...

    @property
    def keep_zeros(self) -> bool | None:
        """Whether every zero of a matrix stays zero."""
        ...


@dataclass(frozen=True, eq=False)
class _Matrix:
    """A matrix with known moments, and the function that poses its problem."""

    linear: str
    weight: Tensor  # of the model
    dtype: torch.dtype  # of the result
    pose: Callable[[], LayerProblem]


def solve_stages(
    zeros: Zeros,
    task: Task,
    inputs: BlockInputs,
    result: PrunedBlock,
    on_layer: OnLayer,
    stages: Sequence[tuple[Stage, MomentAccumulator]],
) -> None:
    """Solve the matrices of some stages and write the weights.

    Parameters
    ----------
    zeros, task, inputs
        Method and pattern, and the block with its task.
    result
        Receives the weights, masks and figures.
    on_layer
        Called after every matrix.
    stages
        Stages, each with the moments of its inputs.
    """
    matrices = [
        matrix
        for stage, accumulator in stages
        for matrix in _matrices(zeros, task, inputs, stage, accumulator)
    ]
    for matrix, solved in _solutions(zeros, task.ranks, inputs.name, matrices):
        name = matrix.linear
        matrix.weight.copy_(solved.weight)  # last: the problem reads the dense weight
        same = solved.weight.dtype == matrix.weight.dtype
        kept = matrix.weight if same else solved.weight
        result.weights[name] = kept.cpu()  # on the CPU not a copy
        result.masks[name] = solved.mask.cpu()
        result.records.append(solved.record)
        trim_memory(matrix.weight.shape[1])  # before the next matrix needs it
        on_layer(solved.record)


def _matrices(
    zeros: Zeros,
    task: Task,
    inputs: BlockInputs,
    stage: Stage,
    accumulator: MomentAccumulator,
) -> list[_Matrix]:
    """Matrices of a stage, which share their moments."""
    trim_memory(task.adapter.weight(inputs.block, stage.linears[0]).shape[1])
    with naming(f"{inputs.name}.{stage.linears[0]}"), timed("gram"):
        if task.ranks.are_several:
            accumulator.add_over(task.ranks.all_reduce)
        moments, exponent = accumulator.release()
    matrices = []
    for index, name in enumerate(stage.linears):
        weight = inputs.weight(task.adapter, name)
        drift = partial(accumulator.drift, index) if task.staged else lambda: None
        gradient = partial(_scaled, inputs.gradients.get(name), exponent, weight.device)
        pose = partial(_pose, zeros, weight, moments, drift, gradient)
        own = task.adapter.weight(inputs.block, name)
        matrices.append(_Matrix(name, own, weight.dtype, pose))
    return matrices


def _solutions(
    zeros: Zeros, ranks: Ranks, block: str, matrices: Sequence[_Matrix]
) -> Iterator[tuple[_Matrix, SolvedMatrix]]:
    """Solutions of the matrices, one by one.

    Several ranks solve their shares first and exchange the solutions afterwards.
    """

    def solved_by(matrix: _Matrix) -> SolvedMatrix:
        name, keep = f"{block}.{matrix.linear}", bool(zeros.keep_zeros)
        return solve_matrix(zeros.method, name, matrix.pose, keep_zeros=keep)

    if not ranks.are_several:
        for matrix in matrices:
            yield matrix, solved_by(matrix)
        return
    # factorizations and sweeps: rows times the square of the width
    costs = [float(m.weight.numel() * m.weight.shape[1]) for m in matrices]
    by = owners(costs, ranks.size)
    own = {
        matrix.linear: solved_by(matrix)
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
    ranks: Ranks, owner: int, name: str, matrix: _Matrix, own: SolvedMatrix | None
) -> SolvedMatrix:
    """Broadcast the solution of a matrix from its owner to every rank."""
    text = None if own is None else json.dumps(own.record.to_dict())
    record = LayerRecord.from_dict(json.loads(ranks.broadcast_text(name, text)))
    if own is None:
        weight = torch.empty(
            matrix.weight.shape, dtype=matrix.dtype, device=matrix.weight.device
        )
        mask = torch.empty_like(weight, dtype=torch.bool)
    else:
        weight, mask = own.weight.contiguous(), own.mask.contiguous()
    ranks.broadcast([weight, mask], owner)
    return SolvedMatrix(weight, mask, record)


def _pose(
    zeros: Zeros,
    weight: Tensor,
    moments: Moments,
    drift: Callable[[], Tensor | None],
    gradient_norm: Callable[[], Tensor | None],
) -> LayerProblem:
    """Pose the problem of one matrix of a stage; create large tensors only now."""
    return LayerProblem.from_moments(
        weight.contiguous(),  # solvers see one layout, however the matrix is stored
        moments,
        pattern=zeros.pattern,
        damping=zeros.method.damping,
        drift=drift(),
        gradient_norm=gradient_norm(),
    )


def _scaled(norm: Tensor | None, exponent: int, device: torch.device) -> Tensor | None:
    """Gradient norms in the units of moments that were scaled by ``2^-exponent``."""
    return None if norm is None else norm.to(device).double() * 2.0 ** (-exponent // 2)

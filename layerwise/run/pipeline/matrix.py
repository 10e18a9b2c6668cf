"""One matrix: pose its problem, solve it, record its figures."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.evaluate import relative_error
from layerwise.lower_bounds import proven_gap_of
from layerwise.problem import LayerProblem
from layerwise.run.pipeline.kept_zeros import solve_within
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.trim import trim_memory
from layerwise.run.steps import status
from layerwise.run.stopwatch import timed
from layerwise.solution import Solution
from layerwise.solve import solve


@dataclass(frozen=True, eq=False)
class SolvedMatrix:
    """One pruned matrix: stored weight and mask, (out, in), and its figures."""

    weight: Tensor
    mask: Tensor
    record: LayerRecord


def solve_matrix(
    method: Method,
    name: str,
    pose: Callable[[], LayerProblem],
    *,
    keep_zeros: bool = False,
) -> SolvedMatrix:
    """Pose and solve the problem of one matrix.

    Parameters
    ----------
    method
        Solver and damping; whether to prove a gap.
    name
        Full name of the layer.
    pose
        Creates the problem; its time counts as time of the layer.
    keep_zeros
        Whether every zero of the weight stays zero.
    """
    start = time.perf_counter()
    status(f"solving {name}")
    with naming(name), timed("solve"):
        problem = pose()
        trim_memory(problem.shape[1])
        find = solve_within if keep_zeros else solve
        solution = find(problem, method.solver)
        stored = solution.weight.to(problem.weight.dtype) + 0.0  # no zero is negative
        seconds = time.perf_counter() - start
        error = solution.relative_error
        if not torch.equal(stored.to(solution.weight.dtype), solution.weight):
            error = relative_error(problem, stored)
        pattern = f"{problem.pattern}, old zeros kept" if keep_zeros else None
        record = record_of(method, name, problem, solution, stored, error, seconds, pattern)
    if method.certify:
        status(f"proving the gap of {name}")
        with naming(name), timed("certify"):
            record = certified(method, record, problem, stored)
    return SolvedMatrix(stored, solution.mask, record)


def record_of(
    method: Method,
    name: str,
    problem: LayerProblem,
    solution: Solution,
    stored: Tensor,
    error: float,
    seconds: float,
    pattern: str | None = None,
) -> LayerRecord:
    """Figures of a matrix; its error is that after the cast to the type of the model.

    `pattern` is the pattern in words, by default that of the problem.
    """
    damping = float(solution.stats.get("damping", method.damping))
    certificate = solution.certificate
    return LayerRecord(
        name=name,
        shape=problem.shape,
        method=method.name,
        pattern=pattern or str(problem.pattern),
        sparsity=int((stored == 0).sum()) / stored.numel(),
        relative_error=error,
        status=str(solution.status),
        certificate=None if certificate is None else certificate.bound,
        certificate_kind=None if certificate is None else certificate.kind,
        damping=damping,
        damping_raised=damping > method.damping,
        rank=problem.moments.rank,
        dead_channels=problem.moments.dead_channels,
        n_tokens=problem.moments.n_tokens,
        iterations=solution.iterations,
        seconds=seconds,
    )


def certified(
    method: Method, record: LayerRecord, problem: LayerProblem, stored: Tensor
) -> LayerRecord:
    """Record with the proven gap of the stored weights, at the damping of the solver."""
    used = problem.with_damping(record.damping)
    gap = proven_gap_of(used, stored, memory_budget=method.memory_budget)
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

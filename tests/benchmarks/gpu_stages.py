"""Stages of the GPU programme: what is timed, and the least that it could take.

A floor is counted work over the rates that the programme measured on the same machine;
every stage says what it counts. Preparation is outside of the times, and the device has
finished whenever a clock is read.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from layerwise.accumulator import MomentAccumulator
from layerwise.evaluate import objective_rows, relative_error
from layerwise.lower_bounds import lower_bounds
from layerwise.patterns import Columns, FixedMask
from layerwise.problem import LayerProblem
from layerwise.solvers.column.refit import refit_columns
from layerwise.solvers.lasso_path import lasso_to_sparsity
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.sparsegpt import SparseGPT
from tests.benchmarks.gpu_layers import SPARSITY, Block, Group

REFIT_TOLERANCE = 1e-6
GAP = 1e-3  # of the l1 problems
ACCURACY = 1e-3  # of their shares of zeros
REFIT_PRODUCTS = 30  # with the gram that the floor of a refit counts
L1_PRODUCTS, BOUND_PRODUCTS = 200, 50
COLUMNS_REMOVED = 0.2
TOKENS_AT_ONCE = 16384
MEMORY_BUDGET: Mapping[str, int] = MappingProxyType({"cpu": 1 << 30, "cuda": 16 << 30})

Found = TypeVar("Found")


@dataclass(frozen=True)
class Rates:
    """Measured ceilings: operations per second by precision, bytes per second."""

    bfloat16: float
    tf32: float
    float32: float
    float64: float
    copy: float


@dataclass(frozen=True)
class Unit:
    """A part of a stage that was timed.

    Parameters
    ----------
    name, rows, width
        Group or matrix, and its shape.
    seconds
        Wall time.
    floor
        Least seconds for the counted work.
    figures
        What else there is to know.
    """

    name: str
    rows: int
    width: int
    seconds: float
    floor: float
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage of the programme.

    Parameters
    ----------
    name
        In the table.
    run
        Yields its units one by one.
    counted
        What the floor counts.
    share
        Seconds after which it is stopped, for the largest model.
    target
        Seconds for a whole model by name of the model.
    """

    name: str
    run: Callable[[Block, Rates, int], Iterator[Unit]]
    counted: str
    share: float
    target: Mapping[str, float] = field(default_factory=dict)


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    device: torch.device, work: Callable[..., Found], *args: Any, **options: Any
) -> tuple[Found, float]:
    """Result and seconds."""
    synchronize(device)
    start = time.perf_counter()
    found = work(*args, **options)
    synchronize(device)
    return found, time.perf_counter() - start


def gram(block: Block, rates: Rates, tokens: int) -> Iterator[Unit]:
    """Moments of bfloat16 activations, chunk by chunk."""
    rate = rates.bfloat16 if block.device.type == "cuda" else rates.float32
    for group in block.layers.groups:
        accumulator = MomentAccumulator(group.width, device=block.device)
        seconds, left = 0.0, tokens
        while left:
            now = min(left, TOKENS_AT_ONCE)
            chunk = torch.randn(now, group.width, dtype=torch.bfloat16, device=block.device)
            seconds += timed(block.device, accumulator.update, chunk)[1]
            left -= now
        seconds += timed(block.device, accumulator.moments)[1]
        floor = tokens * group.width * (group.width + 1.0) / rate
        yield Unit(group.name, tokens, group.width, seconds, floor)


def refit(block: Block, rates: Rates, _: int) -> Iterator[Unit]:
    """Exact refit of every row to a certificate, masks by Wanda, groups stacked."""
    solver = LeastSquares(
        tolerance=REFIT_TOLERANCE, memory_budget=MEMORY_BUDGET[block.device.type]
    )
    for group in block.layers.groups:
        problem = block.problem(group, FixedMask(block.wanda_mask(group)))
        found, seconds = timed(block.device, solver.solve, problem)
        block.answers[group.name] = found.weight
        assert found.certificate is not None
        figures = {
            "certificate": found.certificate.bound,
            "certified": found.certificate.bound <= REFIT_TOLERANCE,
            "iterations": found.iterations,
            "relative_error": relative_error(problem, found.weight),
        }
        floor = REFIT_PRODUCTS * _product(problem) / rates.tf32
        yield Unit(group.name, *problem.shape, seconds, floor, figures)


def sparsegpt(block: Block, rates: Rates, _: int) -> Iterator[Unit]:
    """Factor, choose and sweep, groups stacked."""
    for group in block.layers.groups:
        problem = block.problem(group)
        factoring = timed(
            block.device,
            problem.moments.factor,
            problem.damping,
            problem.dtype,
            reverse=True,
        )[1]
        found, sweep = timed(block.device, SparseGPT().solve, problem)
        floor = group.width**3 / 3 + _product(problem) / 2
        figures = {
            "factor_seconds": factoring,
            "sweep_seconds": sweep,
            "relative_error": relative_error(problem, found.weight),
        }
        seconds = factoring + sweep
        yield Unit(group.name, *problem.shape, seconds, floor / rates.float32, figures)


def fista(block: Block, rates: Rates, _: int) -> Iterator[Unit]:
    """Certified l1 problem of every matrix, its penalty searched for half zeros."""
    for group in block.layers.groups:
        for index, problem in enumerate(block.matrices(group)):
            found, seconds = timed(
                block.device,
                lasso_to_sparsity,
                problem,
                SPARSITY,
                tolerance=GAP,
                accuracy=ACCURACY,
            )
            there = abs(found.sparsity - SPARSITY) <= ACCURACY
            figures = {
                "gap": found.result.gap,
                "certified": found.result.gap <= GAP and there,
                "iterations": found.iterations,
                "penalties": found.penalties,
                "sparsity": found.sparsity,
            }
            floor = L1_PRODUCTS * _product(problem) / rates.tf32
            name = group.name.split(",")[index]
            yield Unit(name, *problem.shape, seconds, floor, figures)


def bounds(block: Block, rates: Rates, _: int) -> Iterator[Unit]:
    """Proven lower bounds of every row, groups stacked; judged is the refit of Wanda."""
    budget = MEMORY_BUDGET[block.device.type]
    for group in block.layers.groups:
        problem = block.problem(group)
        weight = block.answers.get(group.name)
        if weight is None:
            weight = torch.where(block.wanda_mask(group), problem.weight, 0)
        found, seconds = timed(
            block.device, lower_bounds, problem, weight, memory_budget=budget
        )
        value = objective_rows(problem, weight, damped=True)
        figures = {"proven_gap": 1 - float(found.sum() / value.sum())}
        floor = BOUND_PRODUCTS * _product(problem) / rates.tf32
        yield Unit(group.name, *problem.shape, seconds, floor, figures)


def restoration(block: Block, rates: Rates, _: int) -> Iterator[Unit]:
    """Best weights on the columns that stay, one factorization per matrix."""
    for group in block.layers.groups:
        count = round(COLUMNS_REMOVED * group.width)
        problem = block.problem(group, Columns(group.width - count))
        kept = torch.ones(group.width, dtype=torch.bool, device=block.device)
        kept[problem.gram.diagonal().argsort()[:count]] = False
        found, seconds = timed(block.device, refit_columns, problem, kept, REFIT_TOLERANCE)
        bound = found[1].bound
        left = group.width - count
        work = left**3 / 3 + 2.0 * problem.shape[0] * left**2
        figures = {"certificate": bound, "certified": bound <= REFIT_TOLERANCE}
        floor = work / rates.float64
        yield Unit(group.name, *problem.shape, seconds, floor, figures)


def preparation(block: Block, rates: Rates, _: int) -> Iterator[Unit]:
    """Random weights, and grams with the spectra of captured ones; not a result."""
    for group in block.layers.groups:
        seconds = timed(block.device, block.prepare, group)[1]
        yield Unit(group.name, sum(group.rows), group.width, seconds, 0.0)


def _product(problem: LayerProblem) -> float:
    """Operations of one product of all rows with the gram."""
    rows, width = problem.shape
    return 2.0 * rows * width**2


PREPARATION = Stage("preparation", preparation, "nothing", 60)
STAGES = (
    Stage(
        "gram",
        gram,
        "half of every gram, at the bfloat16 rate (float32 on a CPU)",
        40,
    ),
    Stage(
        "sparsegpt",
        sparsegpt,
        "one Cholesky factor and out in^2 operations of the sweep, float32 rate",
        40,
        {"llama-3-8b": 10},
    ),
    Stage(
        "refit",
        refit,
        f"{REFIT_PRODUCTS} products of the rows with the gram, TF32 rate",
        90,
        {"llama-3-8b": 60},
    ),
    Stage(
        "fista",
        fista,
        f"{L1_PRODUCTS} products of the rows with the gram, TF32 rate",
        110,
        {"llama-3-8b": 240},
    ),
    Stage(
        "bounds",
        bounds,
        f"{BOUND_PRODUCTS} products of the rows with the gram, TF32 rate",
        60,
        {"llama-3-8b": 60},
    ),
)
RESTORATION = Stage(
    "restoration",
    restoration,
    "one Cholesky factor of the columns that stay and its solves, float64 rate",
    40,
    {"llama-30b": 180},
)

__all__ = [
    "PREPARATION",
    "RESTORATION",
    "STAGES",
    "Block",
    "Group",
    "Rates",
    "Stage",
    "Unit",
    "synchronize",
    "timed",
]

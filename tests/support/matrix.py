"""One cell of the matrix of inputs, solvers and precisions: pose, solve, check by hand.

The rows and their declared outcomes are in ``matrix_solved.py`` and ``matrix_refused.py``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import LayerwiseError
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured, as_pattern
from layerwise.solution import Solution
from layerwise.solvers import SOLVERS
from tests.support.contract import COLUMN_SOLVERS, assert_exact_count, bits, reason
from tests.support.problems import Layer, make_layer
from tests.support.tolerances import EXPLICIT

SOLVED, NOT_HANDLED = "solved", "pattern not handled"
PRECISIONS = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Sample:
    """What a user gives: inputs, or fields of `Moments` in their place."""

    weight: Any
    inputs: Any = None
    pruned: Any = None
    moments: Mapping[str, Any] | None = None
    posed: Mapping[str, Any] = field(default_factory=dict)

    def problem(self, pattern: Any) -> lw.LayerProblem:
        posed = {"pattern": pattern, "gradient_norm": self.gradient, **self.posed}
        if callable(posed["pattern"]):
            posed["pattern"] = posed["pattern"]()
        if self.moments is None:
            return lw.LayerProblem.from_inputs(
                self.weight, self.inputs, self.pruned, **posed
            )
        return lw.LayerProblem.from_moments(
            self.weight, lw.Moments(**self.moments), **posed
        )

    @property
    def gradient(self) -> Tensor | None:
        """Gradient norms of the shape of the weight, where it has one."""
        shape = getattr(self.weight, "shape", None)
        if shape is None:
            return None
        return torch.ones(tuple(shape), dtype=torch.float64)

    def tensors(self) -> list[Tensor]:
        """Every tensor that must be left alone."""
        given = [self.weight, self.inputs, self.pruned, *(self.moments or {}).values()]
        dense = [v for v in given if isinstance(v, Tensor) and v.layout is torch.strided]
        return [value for value in dense if not value.is_meta and not value.is_quantized]


@dataclass(frozen=True)
class Row:
    """A row of the matrix.

    `outcome` is declared for every solver and precision: ``"solved"``, or the name of an
    error and a part of its message. `but` declares others, by solver or by pattern.
    """

    name: str
    make: Callable[[torch.dtype], Sample]
    outcome: str = SOLVED
    but: Mapping[str, str] = field(default_factory=dict)


def layer_of(dtype: torch.dtype, *args: Any, **kwargs: Any) -> Layer:
    return make_layer(*(args or (1,)), **kwargs).to(dtype)


def of(layer: Layer, **posed: Any) -> Sample:
    return Sample(layer.weight, layer.inputs, layer.pruned_inputs, posed=posed)


def patterns_for(solver: str, shape: tuple[int, int]) -> dict[str, Any]:
    """Patterns that a row without one of its own is posed with."""
    width = shape[1]
    if solver in COLUMN_SOLVERS:
        return {"half": Columns(max(1, width // 2))}
    if solver == "least-squares":
        kept = torch.arange(shape[0] * width).reshape(shape) % 3 > 0
        return {"fixed": FixedMask(kept)}
    return {"row-0.5": Unstructured(0.5), "2:4": NM(2, 4)}


def cells(row: Row, solvers: list[str], two_patterns: bool) -> Iterator[tuple[str, str]]:
    """Solver and name of the pattern of every cell of one precision."""
    sample = row.make(torch.float64)
    for solver in solvers:
        if "pattern" in sample.posed:
            yield solver, "own"
            continue
        names = list(patterns_for(solver, (4, 4)))
        for name in names if two_patterns else names[:1]:
            yield solver, name


def declared(row: Row, solver: str, pattern: str, posed: Any) -> str:
    """Outcome of a cell as the table declares it."""
    for key in (solver, pattern):
        if key in row.but:
            return row.but[key]
    if row.outcome == SOLVED and pattern == "own" and _refused(solver, posed):
        return NOT_HANDLED
    return row.outcome


def _refused(solver: str, posed: Any) -> bool:
    pattern = as_pattern(posed)
    name = "row"
    if isinstance(pattern, Columns):
        name = "columns"
    if isinstance(pattern, FixedMask):
        whole = bool((pattern.kept == pattern.kept[0]).all())
        name = "fixed-columns" if whole else "fixed"
    return reason(solver, name) is not None


def run(row: Row, solver: str, precision: str, pattern: str) -> str | None:
    """None if a cell is as declared, or what happened instead."""
    sample = row.make(PRECISIONS[precision])
    posed = sample.posed.get("pattern")
    if pattern != "own":
        shape = tuple(sample.weight.shape) if hasattr(sample.weight, "shape") else (4, 4)
        posed = patterns_for(solver, shape if len(shape) == 2 else (4, 4))[pattern]
    before = [bits(tensor.detach()).clone() for tensor in sample.tensors()]
    expected = declared(row, solver, pattern, posed)
    try:
        problem = sample.problem(posed)
        found = lw.solve(problem, solver)
    except LayerwiseError as error:
        happened = f"{type(error).__name__}: {error}"
        if "\n" in str(error):
            return f"a message of several lines: {error}"
        if expected == NOT_HANDLED:
            return (
                None if "does not handle" in happened or "finds" in happened else happened
            )
        name, _, part = expected.partition(": ")
        is_declared = type(error).__name__ == name and part in str(error)
        return None if is_declared else f"{happened} (declared: {expected})"
    except Exception as error:
        return f"{type(error).__name__}, not one of layerwise: {error}"
    if expected != SOLVED:
        return f"solved (declared: {expected})"
    if found.status is lw.Status.NUMERICAL_ERROR:
        return "a numerical error without an exception"
    after = [bits(tensor.detach()) for tensor in sample.tensors()]
    if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return "an input has changed"
    return _wrong(problem, found, sample)


def _wrong(problem: lw.LayerProblem, found: Solution, sample: Sample) -> str | None:
    """What is wrong with an answer."""
    if not torch.isfinite(found.weight).all():
        return "a weight is not finite"
    if bits(found.weight[~found.mask]).any():
        return "a removed weight is not zero, or is -0.0"
    try:
        _count(problem.pattern, found.mask)
    except AssertionError as error:
        return f"wrong count: {error}"
    value, size = _objective(problem, found, sample)
    slack = EXPLICIT[_shortest(sample)] * size
    if not abs(float(value - np.longdouble(found.objective))) <= slack:
        return f"objective {found.objective}, by its definition {value}, slack {slack}"
    return None


def _shortest(sample: Sample) -> torch.dtype:
    """float64 if all products are in float64, else float32."""
    given = (sample.inputs, sample.pruned)
    types = [str(v.dtype).removeprefix("torch.") for v in given if v is not None]
    return torch.float64 if all(t == "float64" for t in types) else torch.float32


def _count(pattern: Pattern, mask: Tensor) -> None:
    assert_exact_count(pattern, mask)


def _long(value: Any) -> Any:
    """Numbers in the longest type of numpy."""
    dense = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
    return dense.detach().double().numpy().astype(np.longdouble)


def _objective(
    problem: lw.LayerProblem, found: Solution, sample: Sample
) -> tuple[Any, float]:
    """Objective by its definition, and the size of its terms."""
    dense, weight = _long(problem.weight), _long(found.weight)
    if sample.moments is None:
        inputs = _long(_native(sample.inputs))
        seen = inputs if sample.pruned is None else _long(_native(sample.pruned))
        error = dense @ inputs - weight @ seen
        if found.bias is not None:
            error = error - _long(found.bias)[:, None]
        norms = np.sqrt((inputs**2).mean(axis=1)) + np.sqrt((seen**2).mean(axis=1))
        size = (((abs(dense) + abs(weight)) @ norms) ** 2).sum()
        return (error**2).sum() / inputs.shape[1], float(size)
    gram, change = _long(problem.gram), dense - weight
    rows = ((change @ gram) * change).sum(axis=1)
    if problem.shift is not None:
        cross = _long(problem.cross_gram)
        rows = ((weight @ gram) * weight - 2 * (dense @ cross) * weight).sum(axis=1)
        rows = rows + _long(problem.energy)
    if found.bias is not None:
        rows = rows - (change @ _long(problem.moments.input_mean)) ** 2
    diagonal = np.sqrt(np.diag(gram))
    value = np.maximum(rows, 0).sum()  # a gram of bfloat16 may give less than zero
    return value, float((((abs(dense) + abs(weight)) @ diagonal) ** 2).sum())


def _native(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return np.array(value, dtype=value.dtype.newbyteorder("="))
    return value


ALL_SOLVERS = list(SOLVERS)

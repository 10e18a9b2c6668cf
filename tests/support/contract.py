"""The cases of the tests of all solvers, and the properties of each solver.

Every solver in ``SOLVERS`` is in the cases automatically. The tuples name the solvers that
have a property, or lack it.
"""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Solution
from layerwise.solvers import SOLVERS, get_solver
from tests.support.problems import PATTERNS, PROBLEMS, Layer, fits

MULTI_WEIGHT = tuple(name for name in SOLVERS if name.startswith("multi-weight"))
# Weights of a row depend on that row alone; the others search a penalty for the layer
# (fista), follow its support (alps, best), or stop at a share of its objective (swaps).
ROW_BY_ROW = (
    *("magnitude", "wanda", "gblm", "dsnot", "frank-wolfe", "sparse-swaps"),
    *("sparsegpt", *MULTI_WEIGHT, "least-squares", "admm", "obs"),
)
COLUMN_SOLVERS = ("columns", "fasp", "flap", "wanda-sp", "magnitude-sp")
# What a solver cannot do by its nature; it must take every other pattern.
NEEDS_A_MASK = ("least-squares",)
ONLY_CHOOSES_MASKS = ("dsnot",)
SINGLE_ENTRIES = (
    *("sparsegpt", "obs", "swaps", "sparse-swaps", "dsnot", "frank-wolfe"),
    *MULTI_WEIGHT,
)
# The order of the inputs is not part of the method; SparseGPT sweeps from left to right.
ANY_COLUMN_ORDER = (
    *("magnitude", "wanda", "ria", "gblm", "dsnot", "frank-wolfe", "sparse-swaps"),
    *("multi-weight-sm", "fista", "least-squares", "admm", "alps", "obs", "swaps", "best"),
    *COLUMN_SOLVERS,
)
ACTIVATION_AWARE = (
    *("wanda", "ria", "gblm", "dsnot", "sparsegpt", *MULTI_WEIGHT),
    *("fista", "alps", "obs", "swaps", "sparse-swaps", "best"),
    *("columns", "fasp", "flap", "wanda-sp"),
)
# While rho is below the smallest eigenvalue, removed entries return in turn, and the steps
# may end in such a cycle.
CYCLING = ("alps",)
# Their scores compare more than sizes and norms: sums of the weights, means of the inputs.
OTHER_SCORES = ("ria", "dsnot", "columns", "flap")


def takes(solver: str, problem: str, pattern: str) -> bool:
    layer = PROBLEMS[problem]
    posed = PATTERNS[pattern](layer)
    return fits(posed, layer) and get_solver(solver).can_solve(layer.problem(posed))


def reason(solver: str, pattern: str) -> str | None:
    """Why a solver does not take a pattern, or None."""
    fixed, columns = pattern.startswith("fixed"), "column" in pattern
    if solver in NEEDS_A_MASK and not fixed:
        return "it-needs-a-mask"
    if solver in SINGLE_ENTRIES and columns and not fixed:
        return "columns-are-not-single-entries"
    if solver in ONLY_CHOOSES_MASKS and fixed:
        return "it-only-chooses-masks"
    if solver in COLUMN_SOLVERS and not columns:
        return "it-removes-whole-columns"
    return None


REFUSALS = [
    pytest.param(*case, id=f"{'-'.join(case)}-{reason(*case)}")
    for case in product(SOLVERS, PATTERNS)
    if reason(*case) is not None
]
CASES = [
    pytest.param(*case, id="-".join(case))
    for case in product(SOLVERS, PROBLEMS, PATTERNS)
    if takes(*case)
]
REPEATED_PATTERNS = ("layer-0.5", "2:4", "column-heads", "fixed", "fixed-columns")
REPEATED = [case for case in CASES if case.values[2] in REPEATED_PATTERNS]
every_case = pytest.mark.parametrize(("solver", "problem", "pattern"), CASES)
repeated_case = pytest.mark.parametrize(("solver", "problem", "pattern"), REPEATED)
every_solver = pytest.mark.parametrize("solver", SOLVERS)


@cache
def posed(problem: str, pattern: str) -> LayerProblem:
    layer = PROBLEMS[problem]
    return layer.problem(PATTERNS[pattern](layer))


@cache
def solved(solver: str, problem: str, pattern: str) -> Solution:
    return lw.solve(posed(problem, pattern), solver)


def for_solver(solver: str, layer: Layer, pattern: Pattern) -> LayerProblem:
    """Problem with the pattern, or with the nearest one that a solver takes.

    The nearest one is a mask of the pattern or, for whole columns, as many columns as a row
    of that mask keeps.
    """
    problem = layer.problem(pattern)
    if get_solver(solver).can_solve(problem):
        return problem
    mask = pattern.mask(problem.weight.double().abs())
    fixed = problem.with_pattern(FixedMask(mask))
    if get_solver(solver).can_solve(fixed):
        return fixed
    return problem.with_pattern(Columns(max(1, int(mask.sum()) // len(mask))))


def as_measured(layer: Layer, solution: Solution) -> Layer:
    """Layer on which a solution is measured: about the means if it has a bias."""
    return layer if solution.bias is None else layer.centered()


def posable(solvers: Iterable[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of a solver and a pattern that `for_solver` can pose."""
    return [
        (solver, name)
        for solver, name in product(solvers, names)
        if name != "fixed" or takes(solver, "drifted", name)
    ]


def bits(tensor: Tensor) -> Tensor:
    """Every bit of a tensor, so that -0.0 differs from 0.0."""
    return tensor.contiguous().view(torch.uint8)


def exact_floor(sparsity: float, size: int) -> int:
    return int(Fraction(str(sparsity)) * size // 1)


def assert_exact_count(pattern: Pattern, mask: Tensor) -> None:
    """Count zeros in a second way, not through ``Pattern.accepts``."""
    removed = (~mask).int()
    if isinstance(pattern, Unstructured) and pattern.group == "layer":
        assert int(removed.sum()) == exact_floor(pattern.sparsity, mask.numel())
    elif isinstance(pattern, Unstructured):
        expected = exact_floor(pattern.sparsity, mask.shape[1])
        assert removed.sum(dim=1).tolist() == [expected] * len(mask)
    elif isinstance(pattern, NM):
        groups = removed.reshape(len(mask), -1, pattern.m).sum(dim=2)
        assert torch.unique(groups).tolist() == [pattern.m - pattern.n]
    elif isinstance(pattern, Columns):
        assert bool((mask == mask[0]).all())
        units = pattern.units(mask.shape[1], mask.device).tolist()
        kept = {unit for unit, stays in zip(units, mask[0].tolist(), strict=True) if stays}
        gone = set(units) - kept
        whole = [unit in kept for unit in units]
        assert mask[0].tolist() == whole
        heads = pattern.heads(len(kept | gone), mask.device).tolist()
        for head in set(heads):
            assert sum(heads[unit] == head for unit in kept) == pattern.keep
    else:
        assert isinstance(pattern, FixedMask)
        assert torch.equal(mask, pattern.kept)

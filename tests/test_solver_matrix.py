"""Every solver on every pattern, with X = Xhat and without, in both precisions.

Nothing is skipped: where a solver does not take a pattern, its id says ``refuses``, and
the test is that it is refused by name.
"""

from itertools import product

import pytest
import torch

import layerwise as lw
from layerwise.errors import InvalidProblemError
from layerwise.solution import Status
from layerwise.solvers import SOLVERS, get_solver
from tests.support.problems import PATTERNS, Layer, make_layer
from tests.support.tolerances import EXPLICIT

LAYERS = {
    "same-inputs": make_layer(31, rows=8, width=24, tokens=96, correlation=0.5),
    "pruned-inputs": make_layer(
        32, rows=8, width=24, tokens=96, correlation=0.5, drift=0.2
    ),
}
PRECISIONS = {"float32": torch.float32, "float64": torch.float64}

# what a solver cannot do by its nature; anything else must be solved
NEEDS_A_MASK = {"least-squares"}
NEEDS_SINGLE_ENTRIES = {
    *("sparsegpt", "obs", "swaps", "sparse-swaps", "dsnot", "frank-wolfe"),
    *(name for name in SOLVERS if name.startswith("multi-weight")),
}
CHOOSES_A_MASK = {"dsnot"}
REMOVES_COLUMNS = {"columns", "fasp", "flap", "wanda-sp", "magnitude-sp"}


def reason(solver: str, pattern: str) -> str | None:
    """Why a solver does not take a pattern, or None."""
    fixed, columns = pattern.startswith("fixed"), "column" in pattern
    if solver in NEEDS_A_MASK and not fixed:
        return "it-needs-a-mask"
    if solver in NEEDS_SINGLE_ENTRIES and columns and not fixed:
        return "columns-are-not-single-entries"
    if solver in CHOOSES_A_MASK and fixed:
        return "it-only-chooses-masks"
    if solver in REMOVES_COLUMNS and not columns:
        return "it-removes-whole-columns"
    return None


GRID = list(product(SOLVERS, PATTERNS, LAYERS, PRECISIONS))
SOLVED = [
    pytest.param(*case, id="-".join(case)) for case in GRID if reason(*case[:2]) is None
]
REFUSED = [
    pytest.param(*case, id=f"{'-'.join(case)}-refuses-{reason(*case[:2])}")
    for case in GRID
    if reason(*case[:2]) is not None
]


def test_no_case_is_left_out() -> None:
    assert len(SOLVED) + len(REFUSED) == len(SOLVERS) * len(PATTERNS) * 4


@pytest.mark.parametrize(("solver", "pattern", "inputs", "precision"), SOLVED)
def test_solved(solver: str, pattern: str, inputs: str, precision: str) -> None:
    layer = LAYERS[inputs].to(PRECISIONS[precision])
    posed = PATTERNS[pattern](layer)
    solution = lw.solve(layer.problem(posed), solver)
    assert posed.accepts(solution.mask)
    assert not solution.weight[~solution.mask].any()
    assert solution.weight.dtype == PRECISIONS[precision]
    assert solution.status in (Status.FEASIBLE, Status.OPTIMAL)
    slack = EXPLICIT[PRECISIONS[precision]] * layer.magnitude(solution.weight)
    assert solution.objective == pytest.approx(
        layer.explicit(solution.weight, solution.bias), abs=slack, rel=0
    )
    assert solution.objective < _without_weights(layer)


@pytest.mark.parametrize(("solver", "pattern", "inputs", "precision"), REFUSED)
def test_refused(solver: str, pattern: str, inputs: str, precision: str) -> None:
    layer = LAYERS[inputs].to(PRECISIONS[precision])
    problem = layer.problem(PATTERNS[pattern](layer))
    with pytest.raises(InvalidProblemError, match=get_solver(solver).name):
        lw.solve(problem, solver)


def _without_weights(layer: Layer) -> float:
    return layer.explicit(torch.zeros_like(layer.weight))

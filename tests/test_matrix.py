"""Every input, solver and precision ends as declared: solved and true, or refused by name.

The short form takes forty inputs and nine solvers in three precisions; the rest is nightly.
"""

import pytest

from layerwise.solvers import SOLVERS
from tests.support import matrix_refused, matrix_solved
from tests.support.matrix import ALL_SOLVERS, PRECISIONS, Row, cells, run

ROWS = {row.name: row for row in (*matrix_solved.ROWS, *matrix_refused.ROWS)}
SHORT_SOLVERS = [
    *("magnitude", "wanda", "gblm", "sparsegpt", "multi-weight-mm", "alps"),
    *("least-squares", "columns", "flap"),
]
SHORT = """
weight 1x16, weight 6x1, 1 tokens, 16 tokens, condition 1e16, inputs times 1e-24
inputs times 1e30, weight times 1e-15, weight times 1e20, weights of 3e38
a channel times 1e-24, a channel times 1e5, a row of the weight times 1e12, 4 dead channels
8 equal channels, 4 constant channels, means of 3000, means move, a zero weight
equal weights, drift 0.1, a channel died, damping 0, weight of stride 0, numpy weight
sparsity 0.29 of the layer, gram of rank five in bfloat16, gram and means
nan in weight, inf in input_mean, weight is float8, weight is None, gram is complex
width 0, drift is short, gram is indefinite, means beyond the gram, weights of 1e-310
'2' of '4', mask is a list
"""
NAMES = [name for line in SHORT.strip().split("\n") for name in line.split(", ")]


def mismatches(row: Row, solvers: list[str], *, two_patterns: bool) -> list[str]:
    found = []
    for precision in PRECISIONS:
        for solver, pattern in cells(row, solvers, two_patterns):
            happened = run(row, solver, precision, pattern)
            if happened is not None:
                found.append(f"{solver} in {precision} with {pattern}: {happened}")
    return found


def test_the_matrix_has_its_size() -> None:
    assert len(ROWS) == len(matrix_solved.ROWS) + len(matrix_refused.ROWS)  # no name twice
    assert len(ROWS) >= 266
    assert set(SHORT_SOLVERS) <= set(SOLVERS)
    assert len(set(NAMES)) * len(SHORT_SOLVERS) * len(PRECISIONS) >= 1080


@pytest.mark.parametrize("name", NAMES)
def test_every_cell_is_as_declared(name: str) -> None:
    assert mismatches(ROWS[name], SHORT_SOLVERS, two_patterns=False) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ROWS)
def test_every_cell_of_the_whole_matrix_is_as_declared(name: str) -> None:
    assert mismatches(ROWS[name], ALL_SOLVERS, two_patterns=True) == []

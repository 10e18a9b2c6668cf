"""The enumeration behind the optimality table, against SCIP and every solver."""

import pytest
import torch

import layerwise as lw
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.solvers import SOLVERS
from layerwise.solvers.columns import ColumnPruning
from tests.benchmarks.optimality import (
    PATTERNS,
    SPECTRA,
    enumerated_optimum,
    main,
    methods,
    problems,
    ratios,
    row_masks,
    scip_difference,
)
from tests.support.tolerances import REFIT_REFERENCE, ROUNDING, SCIP_REFERENCE

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [(NM(2, 4), 216), (NM(1, 4), 64), (Unstructured(0.5), 924), (NM(4, 4), 1)],
    ids=str,
)
def test_every_mask_of_a_row_is_tried_once(pattern: Pattern, count: int) -> None:
    masks = row_masks(pattern, 12)
    assert len(torch.unique(masks, dim=0)) == len(masks) == count
    assert pattern.accepts(masks)


@every_spectrum
@every_pattern
def test_no_solver_beats_the_optimum(spectrum: str, pattern: Pattern) -> None:
    posed = list(problems(spectrum, pattern, 2))
    optima = [float(enumerated_optimum(problem)[0].sum()) for problem in posed]
    for method in methods():
        values = ratios(method, posed, optima)
        assert bool((values >= 1 - ROUNDING).all()), method


@every_spectrum
@every_pattern
def test_enumeration_is_reached_by_a_refit(spectrum: str, pattern: Pattern) -> None:
    (problem,) = problems(spectrum, pattern, 1)
    optimum, mask = enumerated_optimum(problem)
    assert pattern.accepts(mask)
    refit = lw.solve(problem.with_pattern(FixedMask(mask)), "least-squares")
    value = objective_rows(problem, refit.weight, damped=True)
    torch.testing.assert_close(value, optimum, rtol=REFIT_REFERENCE, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spectrum", "pattern"),
    [
        ("power-law 1", NM(2, 4)),
        ("real-ish", NM(2, 4)),
        ("power-law 2", Unstructured(0.5)),
        ("MLP-like", Unstructured(0.5)),
    ],
    ids=str,
)
def test_enumeration_agrees_with_scip(spectrum: str, pattern: Pattern) -> None:
    (problem,) = problems(spectrum, pattern, 1)
    assert abs(scip_difference(problem, 0)) <= SCIP_REFERENCE


def test_methods_are_those_of_the_registry() -> None:
    for name in SOLVERS.keys() - {"least-squares", "multi-weight-mm"}:
        whole_columns = isinstance(SOLVERS[name](), ColumnPruning)
        assert (name in methods()) is not whole_columns
    assert "wanda+least-squares" in methods()
    assert "obs+least-squares" not in methods()  # which refits by itself


def test_tables_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["wanda", "wanda+least-squares"]
    assert main(["--solvers", *chosen, "--problems", "2", "--scip", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| wanda |") for line in lines) == len(PATTERNS)
    assert sum(line.startswith("| wanda+least-squares |") for line in lines) == len(
        PATTERNS
    )

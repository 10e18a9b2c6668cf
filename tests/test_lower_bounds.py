"""Lower bounds: below every enumerated optimum, and equal to it where they must be."""

from fractions import Fraction
from importlib import import_module
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.certificates import least_squares_minimum
from layerwise.errors import InvalidProblemError
from layerwise.evaluate import objective_rows
from layerwise.linalg import Factor
from layerwise.lower_bounds import lower_bounds, proven_gap
from layerwise.moments import Moments
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.perspective import relax
from layerwise.problem import LayerProblem
from layerwise.splits import proven_split, smallest_share
from tests.benchmarks.optimality import SPECTRA, enumerated_optimum, problems, row_masks
from tests.support.problems import DEAD_CHANNEL, PROBLEMS, Layer, make_layer
from tests.support.reference import Equations
from tests.support.tolerances import CLOSED_FORM, NEARLY_EXACT, ROUNDING, TYPICAL_BOUND

MODULE: Any = import_module("layerwise.lower_bounds")  # the package has the function
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
BLOCK_DIAGONAL: Any = torch.block_diag  # which has no types
DRIFTED = ("drifted", "correlated", "condition-1e8", "odd-width", "one-row")


def diagonal_problem(rows: int, width: int, pattern: Pattern) -> LayerProblem:
    generator = torch.Generator().manual_seed(5)
    gram = torch.rand(width, generator=generator, dtype=torch.float64).exp().diag()
    weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return LayerProblem.from_moments(weight, Moments(gram), pattern=pattern, damping=0.0)


# --- validity ----------------------------------------------------------------------------


@every_spectrum
@pytest.mark.parametrize(
    ("pattern", "width"),
    [(Unstructured(0.5), 12), (Unstructured(0.7), 14), (NM(2, 4), 16), (NM(1, 4), 12)],
    ids=str,
)
@pytest.mark.parametrize("damping", [0.01, 1e-4])
def test_never_above_the_best_mask(
    spectrum: str, pattern: Pattern, width: int, damping: float
) -> None:
    """2080 rows in all."""
    (problem,) = problems(spectrum, pattern, 1, rows=65, width=width)
    problem = problem.with_damping(damping)
    optimum = enumerated_optimum(problem)[0]
    bound = lower_bounds(problem)
    assert bound.shape == (65,)
    assert bound.dtype == torch.float64
    assert bool((bound <= optimum).all())
    assert bool((bound > 0).all())
    if damping == 0.01:
        assert float((bound / optimum).median()) > TYPICAL_BOUND


def test_float32_weights_and_a_start_are_no_danger() -> None:
    (problem,) = problems("MLP-like", Unstructured(0.5), 1, rows=20)
    weight = problem.weight.float()
    problem = LayerProblem.from_moments(weight, problem.moments, pattern=Unstructured(0.5))
    optimum = enumerated_optimum(problem)[0]
    for start in (lw.solve(problem, "alps").weight, lw.solve(problem, "wanda").weight):
        bound = lower_bounds(problem, start)
        assert bool((bound <= optimum).all())
        assert float((bound / optimum).median()) > TYPICAL_BOUND


@pytest.mark.parametrize("name", DRIFTED)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_never_above_the_best_mask_with_other_inputs(name: str, pattern: Pattern) -> None:
    """C != G: the bound rests on the unconstrained minimum, which is not zero."""
    layer = PROBLEMS[name]
    layer = layer.columns(torch.arange(min(8, layer.shape[1])))
    if isinstance(pattern, NM) and layer.shape[1] % 4:
        pattern = Unstructured(0.7)
    problem = layer.problem(pattern)
    bound = lower_bounds(problem)
    optimum = Equations(layer).enumerated_minimum(pattern)
    slack = ROUNDING * layer.energy
    assert float(bound.sum()) <= optimum + slack
    minimum = least_squares_minimum(problem)
    assert bool((bound >= minimum - slack).all())
    assert float(bound.sum()) > float(minimum.sum())  # more than the floor


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
@pytest.mark.parametrize("drift", [0.1, 1.0])
def test_never_above_the_best_mask_of_any_row_with_other_inputs(
    pattern: Pattern, drift: float
) -> None:
    """300 rows, each against all its masks: L_min + L(y)."""
    layer = make_layer(75, rows=75, width=8, tokens=24, drift=drift, correlation=0.7)
    problem = layer.problem(pattern)
    optimum = torch.full((75,), torch.inf, dtype=torch.float64)
    for mask in row_masks(pattern, 8):
        fixed = problem.with_pattern(FixedMask(mask.expand(75, 8)))
        found = lw.solve(fixed, "least-squares").weight
        value = objective_rows(problem, found, damped=True)
        optimum = torch.minimum(optimum, value)
    bound = lower_bounds(problem)
    assert bool((bound <= optimum).all())
    assert float((bound / optimum).median()) > TYPICAL_BOUND
    assert float((bound - least_squares_minimum(problem)).min()) > 0


@pytest.mark.parametrize(
    "name", ["dead-channel", "few-tokens", "duplicate-channel", "outlier-float32"]
)
@pytest.mark.parametrize("damping", [0.0, 1e-8, 0.01])
def test_hard_grams(name: str, damping: float) -> None:
    layer = PROBLEMS[name].columns(torch.arange(8))
    assert name != "dead-channel" or DEAD_CHANNEL < 8
    problem = layer.problem(Unstructured(0.5), damping)
    bound = lower_bounds(problem)
    assert bool((bound >= 0).all())
    optimum = Equations(layer, damping).enumerated_minimum(Unstructured(0.5))
    assert float(bound.sum()) <= optimum + ROUNDING * layer.energy


def test_one_budget_for_the_layer() -> None:
    layer = make_layer(71, rows=3, width=8)
    pattern = Unstructured(0.5, "layer")
    bound = lower_bounds(layer.problem(pattern))
    assert bound.shape == (1,)
    optimum = Equations(layer).enumerated_minimum(pattern)
    assert TYPICAL_BOUND * optimum < float(bound) <= optimum
    by_row = Equations(layer).enumerated_minimum(Unstructured(0.5))
    assert optimum < by_row  # so a bound of every row would not be one of the layer


def test_one_row_with_one_budget_is_that_row() -> None:
    layer = make_layer(72, rows=1, width=8)
    whole = lower_bounds(layer.problem(Unstructured(0.5, "layer")))
    of_row = lower_bounds(layer.problem(Unstructured(0.5)))
    torch.testing.assert_close(whole, of_row)


# --- where the bound is the optimum ------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.5), NM(2, 4), NM(4, 8), Unstructured(0.5, "layer")],
    ids=str,
)
def test_diagonal_grams_are_exact(pattern: Pattern) -> None:
    """And still from below, compared in exact arithmetic."""
    problem = diagonal_problem(250, 8, pattern)
    weight, gains = problem.weight, problem.weight.square() * problem.gram.diagonal()
    exact = []
    diagonal = [Fraction(value) for value in problem.gram.diagonal().tolist()]
    for row, gone in zip(weight.tolist(), (~pattern.mask(gains)).tolist(), strict=True):
        terms = zip(row, diagonal, gone, strict=True)
        exact.append(sum(Fraction(w) ** 2 * d for w, d, g in terms if g))
    bound = lower_bounds(problem)
    if isinstance(pattern, Unstructured) and pattern.group == "layer":
        exact = [sum(exact)]
    assert all(Fraction(b) <= e for b, e in zip(bound.tolist(), exact, strict=True))
    expected = torch.tensor([float(e) for e in exact], dtype=torch.float64)
    torch.testing.assert_close(bound, expected, rtol=NEARLY_EXACT, atol=0)


def test_block_diagonal_grams_are_exact_for_their_groups() -> None:
    generator = torch.Generator().manual_seed(9)
    parts = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    gram = BLOCK_DIAGONAL(*(parts @ parts.mT))
    weight = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    problem = LayerProblem.from_moments(weight, Moments(gram), pattern=NM(2, 4))
    optimum = enumerated_optimum(problem)[0]
    bound = lower_bounds(problem)
    assert bool((bound <= optimum).all())
    torch.testing.assert_close(bound, optimum, rtol=NEARLY_EXACT, atol=0)


@pytest.mark.parametrize("name", ["plain", "drifted", "correlated"])
def test_nothing_removed_is_the_least_squares_minimum(name: str) -> None:
    layer = PROBLEMS[name]
    for pattern in (
        Unstructured(0),
        Unstructured(0, "layer"),
        FixedMask(torch.ones(layer.shape, dtype=torch.bool)),
    ):
        problem = layer.problem(pattern)
        found = lower_bounds(problem).sum()
        expected = least_squares_minimum(problem).sum()
        atol = ROUNDING * layer.energy
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["plain", "drifted", "correlated", "condition-1e8"])
def test_fixed_masks_are_exact(name: str) -> None:
    layer = PROBLEMS[name]
    equations = Equations(layer)
    for mask in (
        make_layer(73, *layer.shape).weight > 0,
        torch.zeros(layer.shape, dtype=torch.bool),
    ):
        expected = torch.from_numpy(equations.objective_rows(equations.least_squares(mask)))
        bound = lower_bounds(layer.problem(FixedMask(mask)))
        slack = ROUNDING * layer.energy
        assert bool((bound <= expected + slack).all())
        torch.testing.assert_close(
            bound, expected, rtol=CLOSED_FORM[torch.float64], atol=slack
        )


# --- behaviour ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "drifted"])
def test_more_zeros_raise_the_bound(name: str) -> None:
    layer = PROBLEMS[name]
    found = [lower_bounds(layer.problem(Unstructured(s))) for s in (0, 0.3, 0.6, 0.95)]
    for lower, higher in pairwise(found):
        assert bool((lower < higher).all())


def test_powers_of_two_change_nothing() -> None:
    layer = PROBLEMS["drifted"]
    for pattern in (Unstructured(0.5), NM(2, 4)):
        expected = lower_bounds(layer.problem(pattern))
        for exponent in (-40, 40):
            found = lower_bounds(layer.scaled(2.0**exponent).problem(pattern))
            torch.testing.assert_close(found * 4.0**-exponent, expected)


def test_rows_and_layers_of_zeros() -> None:
    (problem,) = problems("MLP-like", Unstructured(0.5), 1)
    weight = problem.weight.clone()
    weight[2] = 0
    problem = LayerProblem.from_moments(weight, problem.moments, pattern=Unstructured(0.5))
    bound, optimum = lower_bounds(problem), enumerated_optimum(problem)[0]
    assert bool((bound <= optimum).all())
    assert float((bound / optimum).nanmedian()) > TYPICAL_BOUND
    nothing = LayerProblem.from_moments(
        0 * weight, problem.moments, pattern=Unstructured(0.5)
    )
    assert not lower_bounds(nothing).any()
    assert proven_gap(nothing, lw.solve(nothing, "wanda")).bound == 0


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_chunks_of_rows_change_nothing(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PROBLEMS["drifted"]
    problem = layer.problem(pattern)
    budget = 2 * 8 * MODULE.TEMPORARIES * layer.shape[1]
    rounded = lower_bounds(problem), lower_bounds(problem, memory_budget=budget)
    torch.testing.assert_close(*rounded, rtol=1e-6, atol=0)
    sizes: list[int] = []

    def in_float64(inverse: Tensor, weight: Tensor, start: Tensor, pattern: Any) -> Any:
        """Where the rounding of a product, which depends on its rows, does not show."""
        sizes.append(len(weight))
        return relax(inverse.double(), weight.double(), start.double(), pattern)

    monkeypatch.setattr(MODULE, "relax", in_float64)
    whole = lower_bounds(problem)
    assert set(sizes) == {layer.shape[0]}
    sizes.clear()
    found = lower_bounds(problem, memory_budget=budget)
    torch.testing.assert_close(found, whole)
    assert set(sizes) == {2}
    fixed = problem.with_pattern(FixedMask(pattern.mask(problem.weight.abs())))
    torch.testing.assert_close(lower_bounds(fixed, memory_budget=1), lower_bounds(fixed))
    assert layer.shape[0] > 2


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=str)
def test_an_inexact_minimiser_is_no_danger(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient that it leaves is part of the bound."""
    layer = PROBLEMS["drifted"].columns(torch.arange(8))
    problem = layer.problem(pattern)
    expected = lower_bounds(problem)
    exact = Factor.solve_rows
    monkeypatch.setattr(
        Factor, "solve_rows", lambda self, rows: exact(self, rows) * (1 + 1e-3)
    )
    found = lower_bounds(problem)
    optimum = Equations(layer).enumerated_minimum(pattern)
    assert float(found.sum()) <= optimum
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)
    # with nothing removed, what it misses is known
    dense = problem.with_pattern(Unstructured(0))
    slack = ROUNDING * layer.energy
    assert bool((lower_bounds(dense) <= least_squares_minimum(dense) + slack).all())


def test_one_budget_needs_all_rows_at_once() -> None:
    problem = make_layer(71, rows=3, width=8).problem(Unstructured(0.5, "layer"))
    assert torch.equal(lower_bounds(problem, memory_budget=1), lower_bounds(problem))


def test_slight_asymmetry_of_a_given_gram_is_no_danger() -> None:
    """The objective reads the symmetric part alone, and so must the bound."""
    (problem,) = problems("real-ish", Unstructured(0.5), 1, rows=20)
    gram = problem.gram.clone()
    root = gram.diagonal().sqrt()
    gram += torch.triu(0.9e-4 * torch.outer(root, root), 1)
    posed = LayerProblem.from_moments(
        problem.weight, Moments(gram), pattern=Unstructured(0.5)
    )
    symmetric = LayerProblem.from_moments(
        problem.weight, Moments((gram + gram.T) / 2), pattern=Unstructured(0.5)
    )
    optimum = enumerated_optimum(symmetric)[0]
    bound = lower_bounds(posed)
    assert bool((bound <= optimum).all())
    torch.testing.assert_close(bound, lower_bounds(symmetric))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("name", ["drifted", "condition-1e8"])
def test_every_direction_and_split_gives_a_bound(name: str, size: int) -> None:
    """Not only good ones: exact arithmetic says that no mask goes below any of them."""
    layer = PROBLEMS[name].columns(torch.arange(8))
    problem = layer.problem(NM(2, 4), 1e-6)
    scaled = MODULE._ScaledProblem(problem, MODULE.MEMORY_BUDGET)
    blocks = proven_split(scaled.gram, smallest_share(scaled.gram, size))
    assert blocks is not None
    optimum = Equations(layer, 1e-6).enumerated_minimum(NM(2, 4))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        share = float(torch.rand((), generator=generator))
        split = MODULE._Split.of(scaled.gram, share * blocks)
        shape = scaled.free.shape
        direction = torch.randn(shape, generator=generator, dtype=torch.float64)
        bound = scaled.evaluate(split, 10.0 ** (seed % 5 - 2) * direction)
        assert float(bound.sum()) <= optimum + ROUNDING * layer.energy


def test_columns_are_refused() -> None:
    with pytest.raises(InvalidProblemError, match="columns"):
        lower_bounds(PROBLEMS["plain"].problem(Columns(8)))


def test_gap_of_a_solution() -> None:
    (problem,) = problems("real-ish", Unstructured(0.5), 1)
    optimum = float(enumerated_optimum(problem)[0].sum())
    for method in ("magnitude", "wanda", "best"):
        solution = lw.solve(problem, method)
        value = float(objective_rows(problem, solution.weight, damped=True).sum())
        certificate = proven_gap(problem, solution)
        assert certificate.kind == "support"
        assert 1 - optimum / value <= certificate.bound < 1
        bound = lower_bounds(problem, solution.weight).sum()
        assert certificate.bound == pytest.approx(1 - float(bound) / value)
    dense = problem.with_pattern(Unstructured(0))
    assert proven_gap(dense, lw.solve(dense, "wanda")).bound == 0


def test_bounds_of_a_layer_of_zeros_and_of_weights_that_need_gradients() -> None:
    layer = make_layer(3, rows=3, width=8)
    given = torch.nn.Parameter(layer.weight.clone())
    for weight in (0 * layer.weight, layer.weight):
        problem = Layer(weight, layer.inputs).problem(Unstructured(0.5))
        bounds = lower_bounds(problem, given)
        assert not bounds.requires_grad
        assert bool((bounds >= 0).all())
        assert bool(bounds.any()) == bool(weight.any())

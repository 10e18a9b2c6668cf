"""Certificates: tight where theory says so, silent where nothing is proven."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.certificates import (
    ENERGY_FLOOR,
    best_scale,
    bounded_energy,
    l1_bounds,
    least_squares_minimum,
    refit_certificate,
    refit_excess,
    refit_state,
)
from layerwise.evaluate import objective_rows, residual
from layerwise.moments import Moments
from layerwise.patterns import FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Status
from layerwise.solve import solve
from layerwise.solvers.lasso import lasso
from layerwise.solvers.least_squares import LeastSquares
from tests.support.problems import PROBLEMS, Layer, make_layer, uneven_mask
from tests.support.reference import Equations
from tests.support.tolerances import (
    CLOSED_FORM,
    GRID,
    LASSO_GAP,
    LASSO_ITERATIONS,
    ROUNDING,
)

DRIFTED = ("drifted", "correlated", "condition-1e8", "odd-width", "one-row")
EVERYTHING = Unstructured(0)


@pytest.mark.parametrize("name", DRIFTED)
def test_refit_bound_is_exact_on_a_full_mask(name: str) -> None:
    """There the Schur complement is the inverse itself, so a factor would show."""
    layer = PROBLEMS[name]
    problem = layer.problem(EVERYTHING)
    mask = torch.ones(layer.shape, dtype=torch.bool)
    weight = make_layer(81, *layer.shape).weight
    equations = Equations(layer)
    optimum = equations.objective_rows(equations.least_squares(mask))
    excess = equations.objective_rows(weight.numpy()) - optimum
    bound = refit_excess(problem, weight, mask).numpy()
    limit = CLOSED_FORM[torch.float64]
    np.testing.assert_allclose(bound * optimum, excess, rtol=limit)


def test_refit_bound_on_a_diagonal_gram_is_exact_on_any_mask() -> None:
    layer = make_layer(82, rows=4, width=8)
    scale = torch.linspace(1, 3, 8, dtype=torch.float64)
    layer = Layer(layer.weight, 8**0.5 * torch.diag(scale))
    problem = layer.problem(EVERYTHING)
    mask = make_layer(83, rows=4, width=8).weight > 0
    weight = torch.where(mask, make_layer(84, rows=4, width=8).weight, 0)
    equations = Equations(layer)
    optimum = equations.objective_rows(equations.least_squares(mask))
    excess = equations.objective_rows(weight.numpy()) - optimum
    bound = refit_excess(problem, weight, mask).numpy()
    unit = np.maximum(optimum, ENERGY_FLOOR * problem.energy.numpy())
    limit = CLOSED_FORM[torch.float64]
    np.testing.assert_allclose(bound * unit, excess, rtol=limit)


@pytest.mark.parametrize("name", DRIFTED)
def test_any_multipliers_bound_the_excess_and_the_best_are_exact(name: str) -> None:
    """Weak and strong duality, in the units of each row's optimum."""
    layer = PROBLEMS[name].to(torch.float64)
    mask = uneven_mask(layer)
    problem = layer.problem(FixedMask(mask))
    equations = Equations(layer)
    best = torch.from_numpy(equations.least_squares(mask))
    optimum = torch.from_numpy(equations.objective_rows(best.numpy()))
    weight = torch.where(mask, make_layer(85, *layer.shape).weight, 0)
    excess = objective_rows(problem, weight, damped=True) - optimum
    exact = torch.where(mask, 0, residual(problem, best))
    slack = (
        2 * ROUNDING * problem.energy.clamp(min=float(excess.max()))
    )  # bounds have it too
    found = refit_state(problem, weight, mask, exact)
    assert bool(((found.excess - excess).abs() <= slack).all())
    noise = make_layer(86, *layer.shape).weight
    for size in (0.0, 1e-3, 1.0):
        trial = torch.where(mask, 0, exact + size * exact.abs().mean() * noise)
        state = refit_state(problem, weight, mask, trial)
        assert bool((state.excess >= excess - slack).all())
        assert bool((state.objective - state.excess <= optimum + slack).all())
    worse = state.excess > excess + slack
    assert bool((worse == ~mask.all(dim=1)).all())  # multipliers of nothing are exact
    zeros = torch.zeros_like(weight)
    unconstrained = refit_state(problem, weight, mask, zeros)
    least = least_squares_minimum(problem)
    bound = unconstrained.objective - unconstrained.excess
    assert bool(((bound - least).abs() <= slack).all())


def test_refit_bound_ignores_the_residual_off_the_mask() -> None:
    problem = PROBLEMS["drifted"].problem(EVERYTHING)
    nothing = torch.zeros(problem.shape, dtype=torch.bool)
    assert not refit_excess(problem, 0 * problem.weight, nothing).any()
    worst = refit_certificate(problem, 0 * problem.weight, ~nothing)
    every_row = refit_excess(problem, 0 * problem.weight, ~nothing)
    assert worst.bound == float(every_row.max())
    assert worst.bound > float(every_row.min())
    assert worst.kind == "refit"
    assert worst.relative_to == "damped optimum of the row on its mask"


Rational = Sequence[Fraction]


def rational(values: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.tolist()]


def inner(left: Rational, right: Rational) -> Fraction:
    return sum((a * b for a, b in zip(left, right, strict=True)), Fraction())


def exact_excess(problem: LayerProblem, weight: Tensor, mask: Tensor) -> Fraction:
    """Relative excess of a layer of one row, in rational numbers: no rounding at all."""
    gram = [rational(row) for row in problem.gram]
    for index, row in enumerate(gram):
        row[index] += Fraction(problem.ridge)
    dense = rational(problem.weight[0])

    def objective(entries: Rational) -> Fraction:
        change = [a - b for a, b in zip(dense, entries, strict=True)]
        return inner(change, [inner(row, change) for row in gram])

    kept: list[int] = mask[0].nonzero()[:, 0].tolist()
    system = [[*(gram[i][j] for j in kept), inner(gram[i], dense)] for i in kept]
    size = range(len(kept))
    for column in size:  # Gauss and Jordan; a definite gram needs no pivoting
        pivot = system[column]
        for other in size:
            if other != column:
                factor = system[other][column] / pivot[column]
                pairs = zip(system[other], pivot, strict=True)
                system[other] = [a - factor * b for a, b in pairs]
    best = [Fraction()] * len(dense)
    for place, index in enumerate(kept):
        best[index] = system[place][-1] / system[place][place]
    optimum = objective(best)
    least = Fraction(ENERGY_FLOOR) * Fraction(float(problem.energy[0]))
    return (objective(rational(weight[0])) - optimum) / max(optimum, least)


@pytest.mark.parametrize("noise", [1e-7, 1e-6, 1e-5, 1e-3])
@pytest.mark.parametrize("damping", [0.0, 1e-12, 1e-2])
def test_bounds_contain_their_own_rounding(noise: float, damping: float) -> None:
    """Inputs of rank two and some noise, whose gram is singular but for its rounding."""
    mask = torch.tensor([[True, False, True, True, False, True]])
    for seed in range(25):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        inputs = draw(6, 2) @ draw(2, 60) + noise * draw(6, 60)
        posed = LayerProblem.from_inputs(
            draw(1, 6), inputs, pattern=FixedMask(mask), damping=damping
        )
        found = solve(posed, "least-squares")
        assert found.certificate is not None
        problem = posed.with_damping(found.stats["damping"])
        excess = exact_excess(problem, found.weight, mask)
        assert excess <= found.certificate.bound
        state = refit_state(problem, found.weight, mask)
        assert excess <= float(state.relative[0])
        assert found.status is not Status.OPTIMAL or excess <= LeastSquares.tolerance


def test_singular_gram_proves_nothing() -> None:
    layer = PROBLEMS["few-tokens"]
    problem = layer.problem(EVERYTHING, damping=0.0)
    mask = torch.ones(layer.shape, dtype=torch.bool)
    assert torch.isinf(refit_excess(problem, layer.weight, mask)).all()
    assert bool((least_squares_minimum(problem) == -torch.inf).all())
    bounds = l1_bounds(problem, layer.weight, 1.0, torch.zeros_like(layer.weight))
    assert bounds.gap == torch.inf


def test_a_factor_that_is_rounding_proves_nothing() -> None:
    """It factors at the requested damping, but its last pivot is rounding."""
    eps = torch.finfo(torch.float64).eps
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 4 * eps]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    problem = LayerProblem.from_moments(
        weight, Moments(gram), pattern=EVERYTHING, damping=0.0
    )
    factor = problem.factor(torch.float64)
    assert not factor.raised
    rows = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    bound = bounded_energy(factor, rows, torch.zeros(2, dtype=torch.float64))
    assert bound.tolist() == [0.0, float("inf")]


def test_certificates_do_not_depend_on_the_scale() -> None:
    layer = PROBLEMS["drifted"]
    mask = Unstructured(0.5).mask(layer.weight.abs())
    weight = torch.where(mask, layer.weight, 0)
    expected = refit_excess(layer.problem(EVERYTHING), weight, mask)
    for exponent in (-40, 40):
        scaled = layer.scaled(2.0**exponent).problem(EVERYTHING)
        found = refit_excess(scaled, weight, mask)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", DRIFTED)
def test_least_squares_minimum(name: str) -> None:
    layer = PROBLEMS[name]
    equations = Equations(layer)
    weight = equations.least_squares(torch.ones(layer.shape, dtype=torch.bool))
    expected = torch.from_numpy(equations.objective_rows(weight))
    found = least_squares_minimum(layer.problem(EVERYTHING))
    slack = ROUNDING * layer.energy
    torch.testing.assert_close(found, expected, rtol=0, atol=slack)
    assert found.any()
    same = Layer(layer.weight, layer.inputs)
    assert not least_squares_minimum(same.problem(EVERYTHING)).any()


@pytest.mark.parametrize("name", DRIFTED)
def test_l1_bounds_meet_at_the_optimum(name: str) -> None:
    problem = PROBLEMS[name].problem(EVERYTHING)
    penalty = 0.2 * float(problem.target.abs().max())
    result = lasso(problem, penalty, tolerance=LASSO_GAP, max_iterations=LASSO_ITERATIONS)
    bounds = l1_bounds(problem, result.weight, penalty, result.subgradient)
    assert bool((bounds.excess <= 2 * LASSO_GAP * bounds.primal).all())
    assert bool((bounds.excess >= 0).all())
    of_residual = l1_bounds(problem, result.weight, penalty)
    assert bool((of_residual.excess >= bounds.excess).all())
    smooth = objective_rows(problem, result.weight, damped=True)
    expected = smooth + penalty * result.weight.abs().sum(dim=1)
    torch.testing.assert_close(bounds.primal, expected, rtol=ROUNDING, atol=0)
    assert bool((bounds.rounding <= ROUNDING * expected).all())


def test_l1_bounds_by_hand() -> None:
    """One weight: minimise ``(w - 3)^2 + 2 |w|``, solved by 2 with value 5."""
    layer = Layer(
        torch.tensor([[3.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    )
    problem = layer.problem(EVERYTHING, damping=0.0)
    for weight, primal in ((2.0, 5.0), (3.0, 6.0), (0.0, 9.0), (1.0, 6.0)):
        found = l1_bounds(problem, torch.tensor([[weight]], dtype=torch.float64), 2.0)
        assert float(found.primal) == pytest.approx(primal)
        if weight in (2.0, 1.0, 0.0):  # the residual, scaled to at most one, is 1 or less
            assert float(found.dual) == pytest.approx(5.0)
    at_least_squares = l1_bounds(problem, layer.weight, 2.0).dual
    # no residual, no dual point but zero
    assert float(at_least_squares) == pytest.approx(0, abs=ROUNDING)


def test_the_best_feasible_scale_has_the_smallest_excess() -> None:
    excess, inner = torch.tensor([4.0]).double(), torch.tensor([1.0]).double()
    largest = torch.tensor([2.0]).double()
    for penalty in (0.5, 1.0, 4.0, 100.0):
        limit = penalty / 4
        scales = torch.linspace(-limit, limit, 4001).double()

        def gap(scale: Tensor) -> Tensor:
            return (1 - scale).square() * excess - 2 * scale * inner

        best = best_scale(excess, inner, largest, penalty)
        assert abs(float(best)) <= limit
        assert float(gap(best)) <= float(gap(scales).min()) + ROUNDING
        assert float(gap(best)) == pytest.approx(float(gap(scales).min()), rel=GRID)


def test_certificate_of_a_solution_survives_the_front_door() -> None:
    layer = PROBLEMS["drifted"].scaled(2.0**30)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    solution = lw.solve(problem, "least-squares")
    assert solution.certificate is not None
    recomputed = refit_certificate(problem, solution.weight, mask)
    # both are rounding errors squared, so only their size can be compared
    assert max(solution.certificate.bound, recomputed.bound) <= ROUNDING


def test_ten_thousand_bounds_are_not_below_the_excess() -> None:
    """``r_S (G^-1)_SS r_S`` against ``r_S (G_SS)^-1 r_S``, solved row by row."""
    width, rows = 20, 500
    for seed in range(20):
        condition = 10.0 ** (seed % 7)
        layer = make_layer(
            seed, rows, width, 60, drift=0.1 * (seed % 2), condition=condition
        )
        kept = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) > 0.4
        problem = layer.problem(FixedMask(kept), damping=10.0 ** -(seed % 5))
        weight = torch.where(kept, layer.weight, 0)
        state = refit_state(problem, weight, kept)
        both = kept[:, :, None] & kept[:, None, :]
        eye = torch.eye(width, dtype=torch.float64)
        systems = torch.where(both, problem.damped_gram(torch.float64), eye)
        solved = torch.linalg.solve(systems, state.residual)
        excess = (state.residual * solved).sum(dim=1)
        assert bool((state.excess >= excess * (1 - ROUNDING)).all())
        assert bool((excess > 0).any())
        # and the excess is what the best weights on the support really save
        best = objective_rows(problem, weight + torch.where(kept, solved, 0), damped=True)
        slack = ROUNDING * problem.energy
        assert bool(((state.objective - excess - best).abs() <= slack).all())


def test_weights_that_are_no_numbers_are_not_certified() -> None:
    layer = PROBLEMS["correlated"]
    mask = uneven_mask(layer)
    problem = layer.problem(FixedMask(mask))
    best = lw.solve(problem, "least-squares").weight.clone()
    row = int(mask.sum(dim=1).argmax())
    best[row, int(mask[row].nonzero()[0])] = torch.nan
    relative = refit_excess(problem, best, mask)
    assert relative[row] == torch.inf
    assert refit_certificate(problem, best, mask).bound == torch.inf
    others = torch.arange(len(mask)) != row
    assert bool(torch.isfinite(relative[others]).all())


def test_bounds_hold_where_a_gram_was_given_with_a_slight_asymmetry() -> None:
    """As in files of other programs; the objective reads the symmetric part."""
    width = 101
    gram = torch.eye(width, dtype=torch.float64)
    gram[1:, 0] = 9e-5
    mask = torch.zeros(1, width, dtype=torch.bool)
    mask[:, 0] = True
    problem = lw.LayerProblem.from_moments(
        torch.ones(1, width, dtype=torch.float64),
        lw.Moments(gram),
        pattern=FixedMask(mask),
    )
    found = lw.solve(problem, "least-squares")
    assert found.status is lw.Status.OPTIMAL
    pull = float(gram[1:, 0].sum()) / 2  # half of it is above the diagonal
    expected = 1 + pull / (1 + problem.ridge)
    assert float(found.weight[0, 0]) == pytest.approx(expected, rel=ROUNDING)

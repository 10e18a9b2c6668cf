"""Rounded moments: nothing is claimed that the stored numbers do not say."""

import math
from fractions import Fraction

import pytest
import torch
from flint import arb
from torch import Tensor

import layerwise as lw
from layerwise.certificates import bounded_energy, least_squares_minimum, refit_excess
from layerwise.evaluate import objective_rows, residual, unclamped_rows
from layerwise.linalg import Factor, factorize
from layerwise.lower_bounds import gap_above, lower_bounds, proven_gap_of
from layerwise.moments import Moments
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.rounding import (
    EPSILON,
    ROUNDING,
    damped_diagonal,
    rounding_of_objective,
    size_of_terms,
)
from layerwise.solution import Status
from layerwise.solver import SolverLike
from layerwise.solvers.lasso import lasso
from layerwise.solvers.least_squares import LeastSquares
from tests.support.balls import ExactProblem, exactly, middle
from tests.support.hard_layers import HardLayer

DOUBLE = torch.float64


def double(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=DOUBLE)


def with_minimum(
    minimum: float, pattern: Pattern, last: float = 2.0**-10
) -> tuple[LayerProblem, Fraction]:
    """Identity gram, best dense weights (3, last), and the exact minimum that is stored.

    With the second weight removed, the minimum grows by the square of `last`.
    """
    gram, weight, best = torch.eye(2, dtype=DOUBLE), double([2.0, 1.0]), [3.0, last]
    cross = double([1.5, (last - 1) / 2], [0, 1])  # W (C - G) = best - W, exactly
    shift = [Fraction(best[0]) - 2, Fraction(best[1]) - 1]
    gained = sum(entry**2 for entry in shift)
    drift = float(gained + Fraction(minimum))
    problem = LayerProblem.from_moments(
        weight,
        Moments(gram, cross),
        pattern=pattern,
        drift=torch.tensor([drift], dtype=DOUBLE),
        damping=0.0,
    )
    return problem, Fraction(drift) - gained


PATTERNS = [
    Unstructured(0.5),
    Unstructured(0.5, "layer"),
    NM(1, 2),
    FixedMask(torch.tensor([[True, False]])),
]
in_every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@in_every_pattern
@pytest.mark.parametrize("minimum", [-(2.0**-21), 2.0**-30, 2.0**-21])
def test_bound_above_a_minimum_of_either_sign(pattern: Pattern, minimum: float) -> None:
    """A minimum below zero lowers every bound that rests on it."""
    problem, free = with_minimum(minimum, pattern)
    bound = Fraction(float(lower_bounds(problem)))
    optimum = free + Fraction(2) ** -20
    assert 0.99 * optimum < bound <= optimum
    kept = torch.where(torch.tensor([[True, False]]), double([3.0, 0]), 0)
    assert 0 <= proven_gap_of(problem, kept) < 1e-5


@in_every_pattern
def test_nothing_is_proven_about_an_objective_below_zero(pattern: Pattern) -> None:
    problem, free = with_minimum(-(2.0**-12), pattern)
    weight = double([3.0, 0])
    assert (
        float(unclamped_rows(problem, weight)) < 0 == float(objective_rows(problem, weight))
    )
    assert float(lower_bounds(problem)) == 0
    assert proven_gap_of(problem, weight) == 1
    assert least_squares_minimum(problem).tolist() == pytest.approx([float(free)])
    assert float(least_squares_minimum(problem)) <= free
    # a little worse, so that the objective is positive again
    worse = double([3.0 + 2.0**-5, 0])
    assert float(unclamped_rows(problem, worse)) > 0
    assert proven_gap_of(problem, worse) == 1
    every = torch.ones(1, 2, dtype=torch.bool)
    assert float(refit_excess(problem, worse, every)) > 1 / math.sqrt(EPSILON)


def test_l1_gap_of_a_value_below_zero_is_not_known() -> None:
    problem, _ = with_minimum(-(2.0**-12), Unstructured(0.5))
    penalty = 1e-6
    result = lasso(problem, penalty, tolerance=1e-4)
    assert result.primal == pytest.approx(-(2.0**-12), rel=0.02)
    assert result.gap == math.inf
    assert result.status is Status.MAX_ITERATIONS
    assert 0 < result.rounding < 1e-12


def test_a_bound_above_the_objective_proves_nothing() -> None:
    problem, _ = with_minimum(2.0**-21, Unstructured(0.5))
    weight = double([3.0, 0])
    value = float(objective_rows(problem, weight))
    assert gap_above(problem, weight, 2 * value) == 1
    assert gap_above(problem, weight, value * (1 + 1e-6)) == 1
    assert 0 < gap_above(problem, weight, value) < 1e-6  # both are rounded
    assert gap_above(problem, weight, value / 2) >= 0.5
    assert gap_above(problem, weight, -value) == 1
    assert gap_above(problem, weight, -math.inf) == 1


def test_drift_of_an_energy_is_not_clamped() -> None:
    """Energy and moments of other programs, rounded on their own."""
    posed, _ = with_minimum(-(2.0**-21), Unstructured(0.5))
    energy = posed.energy - posed.drift - 2.0**-12
    problem = LayerProblem.from_moments(
        posed.weight, posed.moments, pattern=posed.pattern, energy=energy, damping=0.0
    )
    assert problem.drift.tolist() == [-(2.0**-12)]
    assert float(lower_bounds(problem)) == 0


def test_rounding_of_residuals_and_objectives() -> None:
    """Their errors, in ball arithmetic, stay below what certificates allow for."""
    closest = 0.0
    for seed in range(150):
        layer = HardLayer.of(seed)
        problem = layer.problem(FixedMask(layer.kept))
        problem = problem.with_damping(problem.factor(DOUBLE).damping)
        weight = torch.where(layer.kept, problem.weight.double(), 0)
        exact, width = ExactProblem(problem), problem.shape[1]
        size = size_of_terms(problem, weight)
        entry = (
            ROUNDING * EPSILON * (width * size[:, None] * damped_diagonal(problem)).sqrt()
        )
        allowed = rounding_of_objective(problem, size).tolist()
        value = unclamped_rows(problem, weight, damped=True).tolist()
        rest = residual(problem, weight)
        for row, found in enumerate(value):
            weights = exactly(weight[row])
            error = abs(exact.value(row, weights) - arb(found))
            assert not error > arb(allowed[row])
            closest = max(closest, middle(error) / (allowed[row] or 1))
            for j, slope in enumerate(exact.slope(row, weights)):
                error = abs(slope - arb(float(rest[row, j])))
                assert not error > arb(float(entry[row, j]))
    assert closest > 0.01  # so the allowance is not idle either


# --- small eigenvalues that probes do not see --------------------------------------------


def hidden_direction(
    width: int, seed: int, size: float, untouched: int = 0
) -> tuple[Tensor, Tensor]:
    """Gram with one eigenvalue `size`, and its vector, which the probes do not see.

    The vector is made orthogonal to all probes of a seed after the scaling to a unit
    diagonal, and has no part in the first channels.
    """
    generator = torch.Generator().manual_seed(seed)
    probes = 2.0 * torch.randint(0, 2, (16, width), generator=generator).double() - 1
    probes[:, :untouched] = 0
    basis = torch.linalg.qr(probes.T)[0]
    vector = torch.randn(width, generator=generator, dtype=DOUBLE)
    vector[:untouched] = 0
    for _ in range(40):
        vector = vector / vector.norm()
        root = (1 - (1 - size) * vector.square()).sqrt()
        seen = vector * root
        vector = (seen - basis @ (basis.T @ seen)) / root
    vector = vector / vector.norm()
    gram = torch.eye(width, dtype=DOUBLE) - (1 - size) * torch.outer(vector, vector)
    return gram, vector


def factor_of(gram: Tensor, damping: float = 1e-17) -> Factor:
    return factorize(gram, float(gram.diagonal().mean()), damping, DOUBLE)


@pytest.mark.parametrize("width", [64, 160, 700])
@pytest.mark.parametrize("seed", [0, 7])
def test_trace_of_the_inverse_is_not_estimated(width: int, seed: int) -> None:
    factor = factor_of(hidden_direction(width, seed, 1e-9)[0])
    assert not factor.raised
    inverse = torch.cholesky_inverse(factor.lower) * factor.root * factor.root[:, None]
    assert factor.unit_trace == pytest.approx(float(inverse.trace()), rel=1e-6)
    assert factor.unit_trace > 1e8
    if seed == 0 and width > 128:
        assert factor.unit_inverse[0] < 1e6  # the probes, which choose methods only


@pytest.mark.parametrize("size", [1e-15, 1e-14, 1e-12, 1e-6])
def test_refit_where_probes_see_nothing(size: float) -> None:
    """Weights that are wrong along the flat direction, which the residual hardly shows."""
    width, removed, errors = 132, 2, (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
    gram, vector = hidden_direction(width, 0, size, removed)
    dense = torch.randn(width, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    kept = torch.arange(width) >= removed
    weight = dense + torch.tensor(errors, dtype=DOUBLE)[:, None] * vector
    mask = kept.expand(weight.shape)
    problem = LayerProblem.from_moments(
        dense.expand(weight.shape), Moments(gram), pattern=FixedMask(mask), damping=1e-17
    )
    assert not problem.factor(DOUBLE).raised
    weight = torch.where(kept, weight, 0)
    exact, claims = (
        ExactProblem(problem.rows(slice(1))),
        refit_excess(problem, weight, mask),
    )
    least = exact.least(0, list(range(removed, width)))
    assert least is not None
    for row, claim in enumerate(claims.tolist()):
        excess = exact.value(0, exactly(weight[row])) - least
        assert not excess > least * arb(claim)
        assert claim < math.inf or size < 1e-12


# --- nothing proven is not an error ------------------------------------------------------

ON_ROWS: list[SolverLike] = [
    "wanda+least-squares",
    "alps",
    "multi-weight-sm",
    LeastSquares(method="cg"),
    LeastSquares(method="cg", side="complement"),
]


@pytest.mark.parametrize("solver", ON_ROWS, ids=str)
@pytest.mark.parametrize("damping", [1e-12, 1e-15])
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_gram_of_few_tokens_at_tiny_damping(
    solver: SolverLike, damping: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 256, generator=generator, dtype=dtype)
    inputs = torch.randn(256, 64, generator=generator, dtype=dtype)
    pattern: Pattern = Unstructured(0.5)
    if isinstance(solver, LeastSquares):
        pattern = FixedMask(pattern.mask(weight.abs()))
    problem = LayerProblem.from_inputs(weight, inputs, pattern=pattern, damping=damping)
    found = lw.solve(problem, solver)
    assert found.certificate is not None
    assert found.certificate.bound >= 0
    if found.certificate.bound == math.inf:
        assert found.status is Status.MAX_ITERATIONS


def test_unproven_energies_keep_the_precision() -> None:
    gram = double([1.0, 1.0], [1.0, 1.0 + 4 * EPSILON])
    bound = bounded_energy(factor_of(gram, 0.0), double([1.0, 1.0]), torch.ones(1).double())
    assert bound.dtype == DOUBLE
    assert bound.tolist() == [math.inf]

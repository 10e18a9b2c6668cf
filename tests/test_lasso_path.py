"""The l1 engine: its two iterations, its dual point, and the search for a sparsity."""

import pytest
import torch
from torch import Tensor

from layerwise.certificates import l1_bounds
from layerwise.errors import InvalidProblemError
from layerwise.evaluate import residual
from layerwise.linalg import largest_eigenvalue
from layerwise.patterns import Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Status
from layerwise.solvers.l1 import fista as l1_fista
from layerwise.solvers.l1 import quadratic as l1_quadratic
from layerwise.solvers.l1.state import CHECK_EVERY
from layerwise.solvers.lasso import L1Path, Quadratic, lasso
from layerwise.solvers.lasso_path import ShareSearch, lasso_to_sparsity
from tests.support.problems import PROBLEMS, make_layer
from tests.support.tolerances import EQUIVARIANCE, LASSO_GAP, ROUNDING

EVERYTHING = Unstructured(0)
NAMES = ("plain", "drifted", "correlated")


def wide() -> LayerProblem:
    """Correlated inputs and enough weights for a share of zeros in steps of 1e-3."""
    return make_layer(81, rows=32, width=64, tokens=400, correlation=0.9).problem(
        EVERYTHING
    )


def test_both_iterations_meet() -> None:
    problem = wide()
    penalty = 0.1 * float(problem.target.abs().max())
    splitting, fista = (
        lasso(problem, penalty, tolerance=LASSO_GAP, method=method)
        for method in ("splitting", "fista")
    )
    assert splitting.status is fista.status is Status.OPTIMAL
    assert splitting.primal == pytest.approx(fista.primal, rel=2 * LASSO_GAP)
    assert splitting.iterations < fista.iterations / 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["splitting", "fista"])
def test_subgradient_is_one(name: str, method: str) -> None:
    problem = PROBLEMS[name].problem(EVERYTHING)
    penalty = 0.2 * float(problem.target.abs().max())
    found = lasso(problem, penalty, method=method, tolerance=1e-2)  # type: ignore[arg-type]
    limit = penalty / 2 * (1 + ROUNDING)
    assert float(found.subgradient.abs().max()) <= limit
    kept = found.weight != 0
    assert kept.any()
    expected = penalty / 2 * found.weight.sign()
    torch.testing.assert_close(
        found.subgradient[kept], expected[kept], rtol=EQUIVARIANCE, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_any_subgradient_gives_a_lower_bound(name: str) -> None:
    problem = PROBLEMS[name].problem(EVERYTHING)
    penalty = 0.2 * float(problem.target.abs().max())
    best = lasso(problem, penalty, tolerance=LASSO_GAP)
    least = l1_bounds(problem, best.weight, penalty).primal
    generator = torch.Generator().manual_seed(5)
    for size in (0.1, 1.0, 10.0):  # what is too large is clamped
        noise = torch.randn(problem.shape, generator=generator, dtype=torch.float64)
        for weight in (problem.weight, best.weight, noise):
            dual = l1_bounds(problem, weight, penalty, size * penalty * noise).dual
            assert bool((dual <= least * (1 + ROUNDING)).all())
    nothing = torch.zeros_like(problem.weight)
    dual = l1_bounds(problem, nothing, penalty, residual(problem, nothing)).dual
    assert bool((dual <= least * (1 + ROUNDING)).all())


def test_gap_of_the_iteration_is_that_of_the_certificate() -> None:
    problem = PROBLEMS["drifted"].problem(EVERYTHING)
    penalty = 0.2 * float(problem.target.abs().max())
    quadratic = Quadratic(problem, "auto")
    weight = problem.weight * (problem.weight.abs() > problem.weight.abs().median())
    subgradient = penalty / 2 * weight.sign()
    rows = torch.arange(len(weight))
    scaled = weight * quadratic.root
    found = quadratic.gap(
        scaled,
        quadratic.residual(scaled),
        subgradient / quadratic.root,
        penalty,
        rows,
    )
    primal = l1_bounds(problem, weight, penalty).primal
    rest = residual(problem, weight)
    distance = problem.factor(torch.float64).inverse_norms(rest - subgradient)
    torch.testing.assert_close(found, distance / primal, rtol=EQUIVARIANCE, atol=0)


def test_step_that_is_too_long_is_shortened() -> None:
    problem = wide()
    penalty = 0.1 * float(problem.target.abs().max())
    path = L1Path(problem, method="fista")
    path.start(problem.weight)
    honest = path.quadratic.lipschitz
    path.quadratic.lipschitz /= 4
    point = path.minimize(penalty, 1e-6, 2000)
    assert len(point.open) == 0
    assert honest / l1_fista.STEP_GROWTH < path.quadratic.lipschitz
    assert path.certify(point, penalty, 1e-6).status is Status.OPTIMAL


def test_rows_that_splitting_leaves_open_are_finished_by_fista(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layerwise.solvers.lasso.SPLITTING_STEPS", CHECK_EVERY)
    problem = wide()
    penalty = 0.1 * float(problem.target.abs().max())
    found = lasso(problem, penalty, tolerance=1e-6)
    assert found.status is Status.OPTIMAL
    assert found.iterations > CHECK_EVERY
    alone = lasso(problem, penalty, tolerance=1e-6, method="splitting", max_iterations=4)
    assert alone.status is Status.MAX_ITERATIONS


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_share_of_zeros_that_is_asked_for(sparsity: float) -> None:
    problem = wide()
    found = lasso_to_sparsity(problem, sparsity)
    share = float((found.result.weight == 0).double().mean())
    assert share == found.sparsity
    assert abs(share - sparsity) <= 1e-3
    assert found.result.status is Status.OPTIMAL
    assert found.result.gap <= 1e-3
    assert found.penalties < 15
    again = lasso(problem, found.penalty, tolerance=LASSO_GAP)
    assert found.result.primal >= again.primal * (1 - LASSO_GAP)
    assert found.result.primal * (1 - found.result.gap) <= again.primal


def test_penalty_is_in_units_of_the_problem() -> None:
    layer = make_layer(81, rows=32, width=64, tokens=400, correlation=0.9)
    expected = lasso_to_sparsity(layer.problem(EVERYTHING), 0.5)
    scaled = lasso_to_sparsity(layer.scaled(2.0**10).problem(EVERYTHING), 0.5)
    assert scaled.penalty == expected.penalty * 4.0**10
    assert torch.equal(scaled.result.weight, expected.result.weight)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5])
def test_sparsity_that_no_penalty_has(sparsity: float) -> None:
    with pytest.raises(InvalidProblemError, match="more than 0 and less than 1"):
        lasso_to_sparsity(PROBLEMS["plain"].problem(EVERYTHING), sparsity)


def test_few_weights_end_the_search() -> None:
    layer = make_layer(82, rows=1, width=4)
    found = lasso_to_sparsity(layer.problem(EVERYTHING), 0.6)
    assert found.sparsity in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.result.gap <= 1e-3


def test_secant_finds_the_share_of_a_line() -> None:
    search = ShareSearch(0.0, 0.5)
    for _ in range(3):
        share = 0.1 + 0.3 * search.log_penalty
        search.update(share)
    assert search.log_penalty == pytest.approx(4 / 3)


def test_matrices_with_the_same_inputs_share_their_metric(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def count(gram: Tensor) -> float:
        calls.append(len(gram))
        return largest_eigenvalue(gram)

    monkeypatch.setattr(l1_quadratic, "largest_eigenvalue", count)
    problem = wide()
    first, second = (Quadratic(problem.with_damping(0.1), "auto") for _ in range(2))
    assert calls == [64, 64]  # one of each metric
    assert torch.equal(first.root, second.root)
    first.lipschitz *= 2  # of this problem, as a step found it
    assert second.lipschitz == Quadratic(problem.with_damping(0.1), "auto").lipschitz
    Quadratic(problem.with_damping(0.2), "auto")
    assert len(calls) == 4

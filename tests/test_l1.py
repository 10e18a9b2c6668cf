"""The l1 problem by FISTA: its iterates, its gap, its restarts, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError, UsageError
from layerwise.patterns import Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Status
from layerwise.solvers.fista import Fista
from layerwise.solvers.lasso import L1Path, Quadratic, lasso
from layerwise.solvers.lasso_path import lasso_to_sparsity
from tests.support.problems import PROBLEMS
from tests.support.tolerances import EQUIVARIANCE, LASSO_GAP, LASSO_ITERATIONS

EVERYTHING = Unstructured(0)
HARD = ("plain", "drifted", "correlated", "condition-1e8", "few-tokens")


def penalty_of(problem: LayerProblem, share: float) -> float:
    """Share of the penalty at which everything is zero."""
    return 2 * share * float(problem.damped()[1].abs().max())


def textbook(
    problem: LayerProblem, penalty: float, lipschitz: float, steps: int
) -> tuple[Tensor, Tensor]:
    """Plain FISTA on gram and target: the thresholded and the extrapolated point."""
    gram, target = problem.damped()
    momentum, current = 1.0, problem.weight
    extrapolated = current
    for _ in range(steps):
        moved = extrapolated + (target - extrapolated @ gram) / lipschitz
        threshold = penalty / (2 * lipschitz)
        following = moved.sign() * (moved.abs() - threshold).clamp(min=0)
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        extrapolated = following + (momentum - 1) / grown * (following - current)
        current, momentum = following, grown
    return current, extrapolated


@pytest.mark.parametrize("name", HARD)
def test_iterates_are_those_of_the_textbook(name: str) -> None:
    problem = PROBLEMS[name].problem(EVERYTHING)
    penalty = penalty_of(problem, 0.1)
    quadratic = Quadratic(problem, "gram")
    lipschitz = quadratic.lipschitz * float(quadratic.root[0]) ** 2
    for steps in (1, 2, 3, 10, 30):
        result = lasso(
            problem,
            penalty,
            tolerance=0,
            max_iterations=steps,
            method="fista",
            metric="gram",
            restart=False,
        )
        expected, extrapolated = textbook(problem, penalty, lipschitz, steps)
        torch.testing.assert_close(result.weight, expected, rtol=0, atol=EQUIVARIANCE)
        assert torch.equal(result.weight == 0, expected == 0)
        assert result.iterations == steps
        if steps in (3, 10):  # the test can tell the two points apart
            assert float((extrapolated - expected).abs().max()) > 100 * EQUIVARIANCE


@pytest.mark.parametrize("name", HARD)
def test_distance_to_the_optimum_falls_as_promised(name: str) -> None:
    """``F(U_k) - F* <= 2 L ||U_0 - U*||^2 / (k + 1)^2``, L of the doubled gram."""
    problem = PROBLEMS[name].problem(EVERYTHING)
    penalty = penalty_of(problem, 0.05)
    best = lasso(problem, penalty, tolerance=LASSO_GAP, max_iterations=LASSO_ITERATIONS)
    assert best.status is Status.OPTIMAL
    quadratic = Quadratic(problem, "gram")
    lipschitz = 2 * quadratic.lipschitz * float(quadratic.root[0]) ** 2
    start = float((problem.weight - best.weight).square().sum())
    for steps in (1, 4, 16, 64):
        primal = lasso(
            problem,
            penalty,
            tolerance=0,
            max_iterations=steps,
            metric="gram",
            restart=False,
        ).primal
        bound = 2 * lipschitz * start / (steps + 1) ** 2
        assert primal - best.primal * (1 + LASSO_GAP) <= bound


@pytest.mark.parametrize("metric", ["auto", "gram", "diagonal"])
@pytest.mark.parametrize(
    ("method", "restart"),
    [("auto", True), ("splitting", True), ("fista", True), ("fista", False)],
)
def test_gap_that_is_asked_for_is_reached(metric: Any, method: Any, restart: bool) -> None:
    problem = PROBLEMS["correlated"].problem(EVERYTHING)
    penalty = penalty_of(problem, 0.1)
    counts = []
    for tolerance in (1e-2, 1e-4, 1e-6):
        result = lasso(
            problem,
            penalty,
            tolerance=tolerance,
            method=method,
            metric=metric,
            restart=restart,
        )
        assert result.status is Status.OPTIMAL
        assert 0 <= result.gap <= tolerance
        counts.append(result.iterations)
    assert counts == sorted(counts)
    assert counts[0] < counts[-1] < 2000


def test_iterations_too_few_are_admitted() -> None:
    problem = PROBLEMS["correlated"].problem(EVERYTHING)
    result = lasso(problem, penalty_of(problem, 0.1), tolerance=1e-9, max_iterations=3)
    assert result.status is Status.MAX_ITERATIONS
    assert result.gap > 1e-9
    assert result.iterations == 3


def test_restart_needs_fewer_iterations() -> None:
    problem = PROBLEMS["correlated"].problem(EVERYTHING)
    penalty = penalty_of(problem, 0.1)
    with_restart, without = (
        lasso(
            problem, penalty, tolerance=LASSO_GAP, method="fista", restart=restart
        ).iterations
        for restart in (True, False)
    )
    assert with_restart < without


def test_rows_restart_and_stop_on_their_own() -> None:
    layer = PROBLEMS["correlated"]
    problem = layer.problem(EVERYTHING)
    penalty = penalty_of(problem, 0.1)
    for options in (
        {"tolerance": 0.0, "max_iterations": 60},
        {"tolerance": 1e-6, "method": "fista"},
        {"tolerance": 1e-6, "method": "splitting"},
    ):
        together = lasso(problem, penalty, **options)
        alone = [
            lasso(layer.rows(torch.tensor([row])).problem(EVERYTHING), penalty, **options)
            for row in range(len(layer.weight))
        ]
        weights = torch.cat([result.weight for result in alone])
        torch.testing.assert_close(together.weight, weights, rtol=0, atol=EQUIVARIANCE)
        assert together.iterations == max(result.iterations for result in alone)


def test_warm_start_is_used() -> None:
    problem = PROBLEMS["correlated"].problem(EVERYTHING)
    penalty = penalty_of(problem, 0.1)
    cold = lasso(problem, penalty, tolerance=1e-6)
    warm = lasso(problem, penalty, tolerance=1e-6, initial=cold.weight)
    assert warm.iterations < cold.iterations / 4
    nothing = lasso(problem, penalty, initial=0 * cold.weight, max_iterations=0)
    assert not nothing.weight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scaling_the_inputs_scales_the_penalty(dtype: torch.dtype) -> None:
    layer = PROBLEMS["drifted"].to(dtype)
    problem = layer.problem(EVERYTHING)
    penalty = penalty_of(problem, 0.1)
    expected = lasso(problem, penalty)
    for exponent in (-50, 3, 50):
        scaled = layer.scaled(2.0**exponent).problem(EVERYTHING)
        found = lasso(scaled, penalty * 4.0**exponent)
        assert torch.equal(found.weight, expected.weight)
        assert found.primal == expected.primal * 4.0**exponent
        assert found.gap == expected.gap


@pytest.mark.parametrize("penalty", [float("nan"), float("inf"), -float("inf")])
def test_penalties_that_are_no_numbers(penalty: float) -> None:
    with pytest.raises(InvalidProblemError, match="must be a finite number"):
        lasso(PROBLEMS["plain"].problem(Unstructured(0.5)), penalty)


def test_starts_of_an_l1_problem_are_checked() -> None:
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    for start, message in (
        (problem.weight * float("nan"), "initial contains NaN"),
        (problem.weight[:1], "initial has shape"),
    ):
        with pytest.raises(InvalidProblemError, match=message):
            lasso(problem, 1.0, initial=start)


@pytest.mark.parametrize("option", ["method", "metric"])
def test_words_of_an_l1_problem_are_checked(option: str) -> None:
    """Wherever one is solved: alone, for a share of zeros, or within `fista`."""
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    wrong: Any = {option: "best"}
    for solving in (
        lambda: lasso(problem, 1.0, **wrong),
        lambda: lasso_to_sparsity(problem, 0.5, **wrong),
        lambda: Fista(**wrong).solve(problem),
    ):
        with pytest.raises(UsageError, match=f"{option} is one of auto"):
            solving()


def test_a_gap_that_is_no_number_is_no_success() -> None:
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    path = L1Path(problem)
    point = path.minimize(1.0, 1e-3, 10)
    broken = replace(point, scaled=point.scaled * float("nan"))
    found = path.certify(broken, 1.0, 1e-3)
    assert found.status is Status.NUMERICAL_ERROR
    assert found.gap == float("inf")


def test_negative_penalty() -> None:
    with pytest.raises(InvalidProblemError, match="not negative, got -1"):
        lasso(PROBLEMS["plain"].problem(EVERYTHING), -1.0)

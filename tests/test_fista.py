"""FISTA: the l1 iteration against its textbook form, and the search around it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solvers.fista import BRACKET, Fista, PenaltySearch, fista_paper
from layerwise.solvers.lasso import L1Path, Quadratic, lasso
from layerwise.solvers.lasso_path import lasso_to_sparsity
from layerwise.solvers.least_squares import LeastSquares
from tests.support.problems import PROBLEMS, make_layer
from tests.support.tolerances import EQUIVARIANCE, LASSO_GAP, LASSO_ITERATIONS, ROUNDING

EVERYTHING = Unstructured(0)
PRUNED = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4)]
HARD = ("plain", "drifted", "correlated", "condition-1e8", "few-tokens")


def damped_objective(problem: LayerProblem, solution: Solution) -> float:
    return float(objective_rows(problem, solution.weight, damped=True).sum())


def penalty_of(problem: LayerProblem, share: float) -> float:
    """Share of the penalty at which everything is zero."""
    return 2 * share * float(problem.damped()[1].abs().max())


# -- the convex problem ----------------------------------------------------------------


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


# -- the search over penalties ---------------------------------------------------------


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("pattern", PRUNED, ids=str)
def test_no_worse_than_its_start(name: str, pattern: Pattern) -> None:
    problem = PROBLEMS[name].problem(pattern)
    initial = lw.solve(problem, "sparsegpt")
    before = damped_objective(problem, initial)
    slack = LeastSquares().tolerance * before
    for solver in (Fista(max_rounds=1), replace(fista_paper(), max_rounds=1)):
        found = lw.solve(problem, solver, initial=initial)
        assert damped_objective(problem, found) <= before + slack


@pytest.mark.parametrize("pattern", PRUNED, ids=str)
def test_answer_is_the_best_of_its_rounds(pattern: Pattern) -> None:
    problem = PROBLEMS["correlated"].problem(pattern)
    seen: list[Mapping[str, float]] = []
    solution = lw.solve(problem, "fista", on_iteration=seen.append)
    assert list(solution.history) == seen
    assert len(seen) >= 3
    value = damped_objective(problem, solution)
    assert value <= min(entry["objective"] for entry in seen) * (1 + ROUNDING)
    assert solution.iterations == sum(entry["iterations"] for entry in seen)
    assert {"penalty", "sparsity", "rounding_share"} <= set(seen[0])
    assert solution.certificate is not None
    assert solution.certificate.kind == "refit"
    assert solution.certificate.bound <= LeastSquares().tolerance
    assert solution.status is Status.FEASIBLE


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("pattern", PRUNED, ids=str)
def test_refit_only_improves(name: str, pattern: Pattern) -> None:
    problem = PROBLEMS[name].problem(pattern)
    plain = lw.solve(problem, Fista(refit=False, max_rounds=3))
    refitted = lw.solve(problem, Fista(max_rounds=3))
    assert torch.equal(plain.mask, refitted.mask)
    assert plain.certificate is None
    before, after = (damped_objective(problem, found) for found in (plain, refitted))
    assert after <= before * (1 + LeastSquares().tolerance)


def test_better_than_its_start_where_inputs_are_correlated() -> None:
    layer = make_layer(71, rows=16, width=32, tokens=200, correlation=0.9)
    problem = layer.problem(Unstructured(0.6))
    found = {
        name: lw.solve(problem, name).objective
        for name in ("fista", "wanda", "wanda+least-squares", "sparsegpt")
    }
    assert found["fista"] < min(found["wanda+least-squares"], found["sparsegpt"])
    assert found["fista"] < 0.5 * found["wanda"]


def test_fixed_mask_is_only_refitted() -> None:
    layer = PROBLEMS["drifted"]
    mask = NM(2, 4).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    solution = lw.solve(problem, "fista")
    refit = lw.solve(problem, "least-squares")
    assert solution.status is Status.OPTIMAL
    assert solution.history == ()
    torch.testing.assert_close(solution.weight, refit.weight, rtol=0, atol=EQUIVARIANCE)


def test_setting_of_the_paper() -> None:
    chosen = fista_paper()
    assert (chosen.max_iterations, chosen.ratio, chosen.patience) == (20, 0.3, 3)
    assert (chosen.polish, chosen.refit, chosen.restart) == (0, False, False)
    problem = PROBLEMS["correlated"].problem(Unstructured(0.5))
    solution = lw.solve(problem, chosen)
    assert all(entry["iterations"] == 20 for entry in solution.history)
    assert solution.certificate is None
    assert solution.status is Status.FEASIBLE


@pytest.mark.parametrize("start", ["wanda", "sparsegpt", "magnitude"])
def test_warm_start_is_the_answer_of_its_solver(start: Any) -> None:
    problem = PROBLEMS["correlated"].problem(Unstructured(0.7))
    chosen = replace(fista_paper(), warm_start=start)
    by_name, by_hand = (
        lw.solve(problem, method) for method in (chosen, lw.chain(start, fista_paper()))
    )
    assert torch.equal(by_name.weight, by_hand.weight)
    assert damped_objective(problem, by_name) <= damped_objective(
        problem, lw.solve(problem, start)
    )
    ignored = lw.solve(problem, lw.chain("sparsegpt", chosen))
    assert torch.equal(ignored.weight, lw.solve(problem, "sparsegpt+fista-paper").weight)


def test_open_warm_start_is_wanda_and_handles_what_wanda_does() -> None:
    problem = PROBLEMS["correlated"].problem(Unstructured(0.7))
    assert fista_paper().warm_start is None
    assert Fista().warm_start == "wanda"
    weights = [
        lw.solve(problem, replace(fista_paper(), warm_start=start)).weight
        for start in (None, "wanda", "sparsegpt")
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    columns = problem.with_pattern(Columns(8))
    assert fista_paper().can_solve(columns)
    assert not replace(fista_paper(), warm_start="sparsegpt").can_solve(columns)


def test_rounds_of_the_paper_by_hand() -> None:
    """One round from Wanda: 20 plain steps from its weights, magnitude, no refit."""
    layer = make_layer(72, rows=6, width=24, tokens=100, correlation=0.95)
    problem = layer.problem(Unstructured(0.7))
    wanda = lw.solve(problem, "wanda")
    one = lw.solve(problem, replace(fista_paper(), max_rounds=1))
    penalty = one.history[0]["penalty"]
    result = lasso(
        problem,
        penalty,
        initial=wanda.weight,
        tolerance=0,
        max_iterations=20,
        metric="gram",
        restart=False,
    )
    mask = Unstructured(0.7).mask(result.weight.abs())
    rounded = torch.where(mask, result.weight, 0)
    value = float(objective_rows(problem, rounded, damped=True).sum())
    assert one.history[0]["objective"] == pytest.approx(value, rel=EQUIVARIANCE)
    lost = result.weight - rounded
    gram = problem.damped()[0]
    share = (float(((lost @ gram) * lost).sum()) / value) ** 0.5
    assert one.history[0]["rounding_share"] == pytest.approx(share, rel=EQUIVARIANCE)
    assert value < damped_objective(problem, wanda)  # so the round is the answer
    torch.testing.assert_close(one.weight, rounded, rtol=0, atol=EQUIVARIANCE)


def test_round_chosen_by_saliency() -> None:
    layer = make_layer(74, rows=8, width=32, tokens=100)
    sizes = torch.linspace(0.2, 5, 32, dtype=torch.float64)
    layer = replace(layer, inputs=layer.inputs * sizes[:, None])
    problem = layer.problem(Unstructured(0.5))
    plain = Fista(max_rounds=1, polish=0, refit=False)
    by = {
        "saliency": lw.solve(problem, plain),
        "magnitude": lw.solve(problem, replace(plain, rounding="magnitude")),
    }
    penalty = by["saliency"].history[0]["penalty"]
    result = lasso(problem, penalty, tolerance=plain.tolerance)
    inverse = torch.linalg.inv(problem.damped()[0])
    mask = problem.pattern.mask(result.weight.square() / inverse.diagonal())
    value = objective_rows(problem, torch.where(mask, result.weight, 0), damped=True).sum()
    found = by["saliency"].history[0]["objective"]
    assert found == pytest.approx(float(value), rel=EQUIVARIANCE)
    assert by["magnitude"].history[0]["objective"] != pytest.approx(found, rel=EQUIVARIANCE)


def test_first_penalty_suits_a_diagonal_gram() -> None:
    """With unit inputs the first penalty removes the weights that the pattern removes."""
    layer = make_layer(73, rows=4, width=32)
    unit = replace(layer, inputs=32**0.5 * torch.eye(32, dtype=torch.float64))
    problem = unit.problem(Unstructured(0.5))
    solution = lw.solve(problem, Fista(max_rounds=1))
    scores = 2 * layer.weight.abs()
    removed = ~Unstructured(0.5).mask(scores)
    expected = float(scores[removed].mean())
    assert solution.history[0]["penalty"] == pytest.approx(expected, rel=EQUIVARIANCE)


def test_patience_and_rounds_end_the_search() -> None:
    problem = PROBLEMS["correlated"].problem(Unstructured(0.5))
    assert len(lw.solve(problem, Fista(max_rounds=2)).history) == 2
    eager = lw.solve(problem, Fista(patience=1))
    patient = lw.solve(problem, Fista(patience=16))
    assert len(eager.history) < len(patient.history) <= 16
    assert damped_objective(problem, patient) <= damped_objective(problem, eager)


def test_penalty_search_brackets_and_bisects() -> None:
    search = PenaltySearch(1.0)
    tried = []
    for too_small in (True, True, False, True, False):
        tried.append(search.penalty)
        search.update(too_small=too_small)
    assert tried == pytest.approx([1, 2, 4, 8**0.5, 128**0.25])
    downwards = PenaltySearch(1.0)
    for _ in range(3):
        downwards.update(too_small=False)
    assert downwards.penalty == 1 / 8
    assert not downwards.finished
    downwards.update(too_small=True)
    while not downwards.finished:
        downwards.update(too_small=downwards.penalty < 0.2)
    assert downwards.penalty == pytest.approx(0.2, rel=BRACKET - 1)

"""FISTA: the l1 iteration against its textbook form, and the search around it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solvers.fista import BRACKET, Fista, PenaltySearch, fista_paper
from layerwise.solvers.lasso import lasso
from layerwise.solvers.least_squares import LeastSquares
from tests.support.problems import PROBLEMS, make_layer
from tests.support.tolerances import EQUIVARIANCE, ROUNDING

PRUNED = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4)]
HARD = ("plain", "drifted", "correlated", "condition-1e8", "few-tokens")


def damped_objective(problem: LayerProblem, solution: Solution) -> float:
    return float(objective_rows(problem, solution.weight, damped=True).sum())


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

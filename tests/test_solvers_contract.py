"""What every solver of the registry owes, on every problem and pattern it can take.

Exact counts, zeros off the mask, the objective of the definition, a truthful status and
certificate, and sensible answers at the limits. Invariances are in
``test_solvers_invariance.py``.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import layerwise as lw
from layerwise.errors import InvalidProblemError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.solution import Status
from layerwise.solver import Solver, requirements
from layerwise.solvers import SOLVERS, get_solver
from layerwise.solvers.least_squares import LeastSquares
from tests.support.contract import (
    ACTIVATION_AWARE,
    ANY_COLUMN_ORDER,
    CASES,
    COLUMN_SOLVERS,
    CYCLING,
    OTHER_SCORES,
    REFUSALS,
    REPEATED,
    ROW_BY_ROW,
    as_measured,
    assert_exact_count,
    bits,
    every_case,
    every_solver,
    for_solver,
    posed,
    repeated_case,
    solved,
)
from tests.support.problems import DEAD_CHANNEL, PATTERNS, PROBLEMS, Layer, layers, patterns
from tests.support.reference import Equations
from tests.support.tolerances import EQUIVARIANCE, EXPLICIT, ROUNDING


def test_cases_cover_registry_and_problems() -> None:
    for cases in (CASES, REPEATED):
        assert {case.values[0] for case in cases} == set(SOLVERS)
        assert {case.values[1] for case in cases} == set(PROBLEMS)
    assert {case.values[2] for case in CASES} == set(PATTERNS)
    names = {*ROW_BY_ROW, *ANY_COLUMN_ORDER, *ACTIVATION_AWARE}
    names |= {*OTHER_SCORES}
    assert names <= set(SOLVERS)


@every_solver
def test_is_a_solver(solver: str) -> None:
    chosen = get_solver(solver)
    assert isinstance(chosen, Solver)
    assert chosen.name == solver
    assert requirements(chosen) <= {"gram", "mean", "gradient", "mask"}


def test_every_pattern_is_taken_but_those_that_are_refused() -> None:
    refused = {case.values for case in REFUSALS}
    cases = (case.values for case in CASES)
    taken = {(solver, pattern) for solver, name, pattern in cases if name == "drifted"}
    assert not refused & taken
    assert refused | taken == set(product(SOLVERS, PATTERNS))


@pytest.mark.parametrize(("solver", "pattern"), REFUSALS)
def test_a_refusal_names_the_solver(solver: str, pattern: str) -> None:
    with pytest.raises(InvalidProblemError, match=rf"^{solver} (finds|does not handle)"):
        lw.solve(posed("drifted", pattern), solver)


@every_case
def test_mask_is_feasible_and_counts_are_exact(
    solver: str, problem: str, pattern: str
) -> None:
    solution, layer = solved(solver, problem, pattern), PROBLEMS[problem]
    assert solution.mask.dtype == torch.bool
    assert solution.mask.shape == solution.weight.shape == layer.shape
    assert_exact_count(posed(problem, pattern).pattern, solution.mask)
    assert not bits(solution.weight[~solution.mask]).any()  # and no -0.0
    wide = layer.weight.dtype == torch.float64
    assert solution.weight.dtype == (torch.float64 if wide else torch.float32)
    assert solution.weight.device == solution.mask.device == layer.weight.device


@every_case
def test_reported_objective_is_the_definition(
    solver: str, problem: str, pattern: str
) -> None:
    solution, layer = solved(solver, problem, pattern), PROBLEMS[problem]
    explicit = layer.explicit(solution.weight, solution.bias)
    slack = EXPLICIT[posed(problem, pattern).dtype] * layer.energy
    assert solution.objective == pytest.approx(explicit, abs=slack, rel=0)
    squared = solution.relative_error**2 * layer.energy
    assert squared == pytest.approx(explicit, abs=slack, rel=0)


@every_case
def test_status_and_certificate_are_truthful(
    solver: str, problem: str, pattern: str
) -> None:
    solution, question = solved(solver, problem, pattern), posed(problem, pattern)
    certificate = solution.certificate
    fixed = isinstance(question.pattern, FixedMask)
    if solution.status is Status.OPTIMAL:
        assert certificate is not None
        assert fixed or certificate.kind == "support"
        assert certificate.bound <= LeastSquares().tolerance
    elif solution.status is Status.MAX_ITERATIONS:
        assert certificate is not None
        assert certificate.bound > LeastSquares().tolerance
    else:
        assert solution.status is Status.FEASIBLE
    if certificate is not None and certificate.kind == "refit":
        layer = as_measured(PROBLEMS[problem], solution)
        equations = Equations(layer, question.damping)
        value = equations.objective(solution.weight)
        best = float(equations.objective_rows(equations.least_squares(solution.mask)).sum())
        # summed over rows, the relative bound of the worst row bounds the whole
        slack = EXPLICIT[question.dtype] * PROBLEMS[problem].energy
        assert value - best <= certificate.bound * best + slack


@repeated_case
def test_no_better_than_a_refit_of_its_mask(
    solver: str, problem: str, pattern: str
) -> None:
    solution, question = solved(solver, problem, pattern), posed(problem, pattern)
    if solution.bias is not None:
        question = question.centered()
    fixed = question.with_pattern(FixedMask(solution.mask))
    refit = lw.solve(fixed, "least-squares")
    value = float(objective_rows(question, solution.weight, damped=True).sum())
    best = float(objective_rows(question, refit.weight, damped=True).sum())
    assert refit.certificate is not None
    energy = float(question.energy.sum())
    assert best <= value * (1 + refit.certificate.bound) + ROUNDING * energy


@pytest.mark.parametrize(
    ("problem", "pattern"),
    [case.values[1:] for case in CASES if case.values[0] == "fista"],
)
def test_fista_improves_on_wanda(problem: str, pattern: str) -> None:
    question = posed(problem, pattern)
    of_fista, of_paper, of_wanda = (
        float(
            objective_rows(
                question, solved(name, problem, pattern).weight, damped=True
            ).sum()
        )
        for name in ("fista", "fista-paper", "wanda")
    )
    slack = LeastSquares().tolerance * of_wanda
    assert of_fista <= of_wanda + slack
    assert of_paper <= of_wanda + slack


# -- limits of the sparsity ------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("problem", ["plain", "plain-float32", "dead-channel"])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_sparsity_zero_returns_the_weight_bit_for_bit(
    solver: str, problem: str, group: Any
) -> None:
    layer = PROBLEMS[problem]
    solution = lw.solve(for_solver(solver, layer, Unstructured(0, group)), solver)
    assert torch.equal(bits(solution.weight), bits(layer.weight))
    assert solution.objective == 0
    assert solution.mask.all()


@every_solver
@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("problem", ["plain", "drifted-float32", "few-tokens"])
def test_sparsity_near_one(solver: str, problem: str, group: Any) -> None:
    layer = PROBLEMS[problem]
    question = for_solver(solver, layer, Unstructured(0.9999, group))
    solution = lw.solve(question, solver)
    assert_exact_count(question.pattern, solution.mask)
    least = 1 if group == "layer" and solver not in COLUMN_SOLVERS else len(layer.weight)
    assert int(solution.mask.sum()) == least
    assert torch.isfinite(solution.weight).all()


@every_solver
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_weights_have_exact_counts(solver: str, value: float) -> None:
    layer = PROBLEMS["plain"]
    layer = replace(layer, weight=torch.full_like(layer.weight, value))
    for pattern in (Unstructured(0.7), Unstructured(0.7, "layer"), NM(2, 4)):
        question = for_solver(solver, layer, pattern)
        solution = lw.solve(question, solver)
        assert_exact_count(question.pattern, solution.mask)
        assert torch.isfinite(solution.weight).all()


@pytest.mark.parametrize("solver", ACTIVATION_AWARE)
def test_dead_channel_is_removed_first(solver: str) -> None:
    problem = for_solver(solver, PROBLEMS["dead-channel"], Unstructured(0.5))
    assert not lw.solve(problem, solver).mask[:, DEAD_CHANNEL].any()


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_dead_channel_is_removed_first_however_large_its_weights(solver: str) -> None:
    layer = PROBLEMS["dead-channel"]
    weight = layer.weight.clone()
    weight[:, DEAD_CHANNEL] = 5
    problem = replace(layer, weight=weight).problem(Unstructured(0.1), damping=1e-6)
    assert not lw.solve(problem, solver).mask[:, DEAD_CHANNEL].any()


# -- properties ------------------------------------------------------------------------


@given(data=st.data())
@every_solver
def test_every_answer_is_feasible(solver: str, data: st.DataObject) -> None:
    layer = data.draw(layers())
    pattern = data.draw(patterns(layer))
    if data.draw(st.booleans(), label="float32"):
        layer = layer.to(torch.float32)
    question = for_solver(solver, layer, pattern)
    solution = lw.solve(question, solver)
    assert_exact_count(question.pattern, solution.mask)
    assert not bits(solution.weight[~solution.mask]).any()
    assert torch.isfinite(solution.weight).all()
    explicit = layer.explicit(solution.weight, solution.bias)
    slack = EXPLICIT[question.dtype] * layer.magnitude(solution.weight)
    assert solution.objective == pytest.approx(explicit, abs=slack, rel=0)


@given(data=st.data())
@pytest.mark.parametrize(
    "solver", [name for name in SOLVERS if name not in (*CYCLING, *OTHER_SCORES)]
)
def test_identity_gram_is_magnitude_pruning(solver: str, data: st.DataObject) -> None:
    weight = data.draw(layers()).weight
    root = weight.shape[1] ** 0.5
    layer = Layer(weight, root * torch.eye(weight.shape[1], dtype=torch.float64))
    question = for_solver(solver, layer, data.draw(patterns(layer)))
    mask = question.pattern.mask(weight.abs())
    solution = lw.solve(question, solver)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(
        solution.weight, torch.where(mask, weight, 0), rtol=EQUIVARIANCE, atol=0
    )


@given(data=st.data())
@every_solver
def test_pruning_again_changes_nothing(solver: str, data: st.DataObject) -> None:
    layer = data.draw(layers(drift=False))
    question = for_solver(solver, layer, data.draw(patterns(layer)))
    once = lw.solve(question, solver)
    again = replace(layer, weight=once.weight).problem(question.pattern)
    twice = lw.solve(again, solver)
    assert torch.equal(twice.weight, once.weight)
    assert twice.objective == 0

"""Solvers against references that share no code with them: CLARABEL, enumeration, SCIP."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import layerwise as lw
from layerwise.certificates import ENERGY_FLOOR, l1_bounds, refit_excess
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Status
from layerwise.solvers import SOLVERS, get_solver
from layerwise.solvers.lasso import STEP_MARGIN, lasso
from tests.support.problems import PROBLEMS, Layer, layers, make_layer
from tests.support.reference import Equations, scip_minimum
from tests.support.tolerances import (
    CLOSED_FORM,
    EXPLICIT,
    L1_REFERENCE,
    L1_STATIONARITY,
    LASSO_GAP,
    LASSO_ITERATIONS,
    REFIT_REFERENCE,
    REFIT_STATIONARITY,
    ROUNDING,
    SCIP_REFERENCE,
)

DAMPINGS = (1e-6, 0.01, 1.0)
DOUBLE = [name for name, layer in PROBLEMS.items() if layer.weight.dtype == torch.float64]


def choosers(problem: LayerProblem) -> list[str]:
    """Names of the solvers that choose a mask of the pattern."""
    return [name for name in SOLVERS if get_solver(name).can_solve(problem)]


def exact_inputs(name: str) -> Layer:
    """Problem of the registry whose inputs are float64, so that its moments are exact."""
    layer = PROBLEMS[name]
    other = None if layer.pruned_inputs is None else layer.pruned_inputs.double()
    return Layer(layer.weight, layer.inputs.double(), other)


def some_mask(layer: Layer, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layer.shape, generator=generator) < 0.6


def test_there_is_something_to_compare() -> None:
    assert len(DOUBLE) >= 8
    problem = make_layer(0).problem(NM(2, 4))
    assert {"fista", "sparsegpt", "wanda", "magnitude"} <= set(choosers(problem))


# -- refit -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("damping", DAMPINGS[:2])
def test_refit_against_clarabel(name: str, damping: float) -> None:
    layer = exact_inputs(name)
    mask = some_mask(layer)
    equations = Equations(layer, damping)
    problem = layer.problem(FixedMask(mask), damping)
    solution = lw.solve(problem, "least-squares")
    reference = equations.objective_rows(equations.clarabel_refit(mask)).sum()
    value = equations.objective(solution.weight)
    assert solution.status is Status.OPTIMAL
    assert value == pytest.approx(reference, abs=REFIT_REFERENCE * layer.energy, rel=0)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_refit_solves_the_normal_equations(name: str, damping: float) -> None:
    layer = exact_inputs(name)
    mask = some_mask(layer)
    problem = layer.problem(FixedMask(mask), damping)
    weight = lw.solve(problem, "least-squares").weight.double()
    seen, inputs = layer.seen.double(), layer.inputs.double()
    gram = seen @ seen.T / seen.shape[1]
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    target = layer.weight.double() @ (inputs @ seen.T / seen.shape[1])
    target += problem.ridge * layer.weight.double()
    stationarity = (target - weight @ gram)[mask]
    limit = REFIT_STATIONARITY[problem.dtype] * float(target.abs().max())
    assert float(stationarity.abs().max()) <= limit


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize(
    ("solver", "damping"),
    [("wanda", 1e-6), ("wanda", 0.01), ("sparsegpt", 1e-6), ("fista", 0.01)],
)
def test_refit_certificate_is_true(name: str, damping: float, solver: str) -> None:
    layer = exact_inputs(name)
    problem = layer.problem(Unstructured(0.5), damping)
    found = lw.solve(problem, solver)
    equations = Equations(layer, damping)
    value = equations.objective_rows(found.weight.double().numpy())
    optimum = equations.objective_rows(equations.least_squares(found.mask))
    bound = refit_excess(problem, found.weight, found.mask).numpy()
    energy = problem.energy.numpy()
    unit = np.maximum(optimum, ENERGY_FLOOR * energy)
    assert (value - optimum <= bound * unit + ROUNDING * energy).all()


@given(data=st.data())
def test_refit_certificate_is_true_of_any_weight(data: st.DataObject) -> None:
    layer = data.draw(layers())
    damping = data.draw(st.sampled_from(DAMPINGS))
    mask = some_mask(layer, data.draw(st.integers(0, 99), label="mask"))
    problem = layer.problem(FixedMask(mask), damping)
    distance = 10.0 ** -data.draw(st.integers(0, 8), label="distance")
    refit = lw.solve(problem, "least-squares").weight
    weight = refit + distance * torch.where(mask, layer.weight, 0)
    equations = Equations(layer, damping)
    value = equations.objective_rows(weight.numpy())
    optimum = equations.objective_rows(equations.least_squares(mask))
    bound = refit_excess(problem, weight, mask).numpy()
    energy = problem.energy.numpy()
    unit = np.maximum(optimum, ENERGY_FLOOR * energy)
    assert (value - optimum <= bound * unit + ROUNDING * layer.magnitude(weight)).all()


# -- l1 --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOUBLE)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_l1_against_clarabel(name: str, share: float) -> None:
    layer = PROBLEMS[name]
    problem = layer.problem(Unstructured(0))
    penalty = 2 * share * float(problem.target.abs().max())
    result = lasso(problem, penalty, tolerance=LASSO_GAP, max_iterations=LASSO_ITERATIONS)
    assert result.status is Status.OPTIMAL
    equations = Equations(layer)
    size = penalty * float(result.weight.abs().sum())
    value = equations.objective(result.weight) + size
    assert value == pytest.approx(result.primal, rel=ROUNDING)
    reference = equations.clarabel_l1(penalty)
    assert value == pytest.approx(reference, abs=L1_REFERENCE * layer.energy, rel=0)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("share", [0.02, 0.3])
def test_duality_gap_is_true(name: str, share: float) -> None:
    layer = exact_inputs(name)
    problem = layer.problem(Unstructured(0))
    penalty = 2 * share * float(problem.target.abs().max())
    # a feasible value, hence above the minimum: the test is stricter than it need be
    reference = Equations(layer).clarabel_l1(penalty)
    slack = ROUNDING * layer.energy
    for iterations in (0, 1, 3, 10, 40):
        result = lasso(problem, penalty, tolerance=0, max_iterations=iterations)
        assert result.primal - reference <= result.gap * result.primal + slack
        bounds = l1_bounds(problem, result.weight, penalty)
        assert float(bounds.dual.sum()) <= reference + slack
        assert float(bounds.primal.sum()) >= reference - slack


@given(data=st.data())
def test_dual_bound_is_below_every_primal_value(data: st.DataObject) -> None:
    layer = data.draw(layers())
    problem = layer.problem(Unstructured(0))
    penalty = 2 * 2.0 ** -data.draw(st.integers(-1, 12)) * float(problem.target.abs().max())
    weights = [layer.weight, torch.zeros_like(layer.weight)]
    weights += [
        lasso(problem, penalty, tolerance=0, max_iterations=count).weight
        for count in (1, 5, 50)
    ]
    bounds = [l1_bounds(problem, weight, penalty) for weight in weights]
    least = torch.stack([found.primal for found in bounds]).amin(dim=0)
    largest = torch.stack([found.dual for found in bounds]).amax(dim=0)
    assert bool((largest <= least + ROUNDING * (problem.energy + least)).all())


@pytest.mark.parametrize("name", DOUBLE)
def test_l1_conditions_of_optimality(name: str) -> None:
    layer = PROBLEMS[name]
    problem = layer.problem(Unstructured(0))
    gram, target = problem.damped()
    largest = float(target.abs().max())
    penalty = 0.2 * largest
    result = lasso(problem, penalty, tolerance=LASSO_GAP, max_iterations=LASSO_ITERATIONS)
    gradient = 2 * (result.weight @ gram - target)
    kept = result.weight != 0
    assert kept.any()
    assert not kept.all()
    slack = L1_STATIONARITY * largest
    assert bool((gradient.abs() <= penalty + slack)[~kept].all())
    wrong = gradient + penalty * result.weight.sign()
    assert float(wrong[kept].abs().max()) <= slack


@pytest.mark.parametrize("name", DOUBLE)
def test_without_penalty_l1_is_least_squares(name: str) -> None:
    layer = PROBLEMS[name]
    problem = layer.problem(Unstructured(0))
    start = torch.zeros_like(layer.weight)
    result = lasso(problem, 0.0, initial=start, tolerance=0, max_iterations=500)
    equations = Equations(layer)
    everything = torch.ones(layer.shape, dtype=torch.bool)
    least = equations.objective_rows(equations.least_squares(everything)).sum()
    value = equations.objective(result.weight)
    assert value == pytest.approx(least, abs=REFIT_REFERENCE * layer.energy, rel=0)
    assert result.primal == pytest.approx(value, abs=ROUNDING * layer.energy, rel=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_from_twice_the_largest_target_all_weights_are_zero(name: str) -> None:
    problem = PROBLEMS[name].problem(Unstructured(0))
    target = problem.damped()[1]
    critical = 2 * float(target.abs().max()) * (1 + EXPLICIT[problem.dtype])
    above = lasso(problem, critical, tolerance=LASSO_GAP)
    assert not above.weight.any()
    below = lasso(problem, 0.99 * critical, tolerance=LASSO_GAP)
    assert below.weight.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_identity_gram_is_a_soft_threshold(dtype: torch.dtype) -> None:
    weight = make_layer(21, rows=3, width=8).weight
    layer = Layer(weight, 8**0.5 * torch.eye(8, dtype=torch.float64)).to(dtype)
    problem = layer.problem(Unstructured(0), damping=0.0)
    tolerance = CLOSED_FORM[dtype]
    # one step is the soft threshold of a step length that is two percent on the safe side
    for iterations, threshold in ((1, 0.5 / STEP_MARGIN), (20, 0.5)):
        result = lasso(problem, 1.0, tolerance=0, max_iterations=iterations)
        expected = weight.sign() * (weight.abs() - threshold).clamp(min=0)
        torch.testing.assert_close(
            result.weight.double(), expected, rtol=tolerance, atol=tolerance
        )


# -- masks -----------------------------------------------------------------------------

SMALL: list[tuple[Layer, Pattern]] = [
    (make_layer(31, rows=2, width=8, drift=0.3), Unstructured(0.5)),
    (make_layer(32, rows=2, width=10, drift=0.3, correlation=0.9), Unstructured(0.7)),
    (make_layer(33, rows=3, width=8, correlation=0.9), Unstructured(0.5, "layer")),
    (make_layer(34, rows=2, width=8, correlation=0.9), NM(2, 4)),
    (make_layer(35, rows=2, width=8, drift=0.3, tokens=6), NM(1, 4)),
    (make_layer(36, rows=2, width=8, condition=1e4), NM(4, 8)),
]


@pytest.mark.parametrize(("layer", "pattern"), SMALL, ids=str)
def test_no_heuristic_beats_the_best_mask(layer: Layer, pattern: Pattern) -> None:
    equations = Equations(layer)
    minimum = equations.enumerated_minimum(pattern)
    problem = layer.problem(pattern)
    slack = ROUNDING * layer.energy
    for name in choosers(problem):
        found = lw.solve(problem, name)
        value = float(objective_rows(problem, found.weight, damped=True).sum())
        assert value == pytest.approx(
            equations.objective(found.weight), abs=slack, rel=0
        ), name
        assert value >= minimum - slack, name
        refit = lw.solve(problem, f"{name}+least-squares")
        value = float(objective_rows(problem, refit.weight, damped=True).sum())
        assert value >= minimum - slack, name


@pytest.mark.parametrize(
    ("width", "rows", "drift"), [(8, 2, 0.3), (12, 1, 0.0), (16, 1, 0.2)]
)
def test_two_of_four_against_scip(width: int, rows: int, drift: float) -> None:
    layer = make_layer(40 + width, rows=rows, width=width, drift=drift, correlation=0.8)
    problem = layer.problem(NM(2, 4))
    minimum, mask = scip_minimum(problem)
    assert NM(2, 4).accepts(mask)
    equations = Equations(layer)
    of_mask = equations.objective_rows(equations.least_squares(mask)).sum()
    slack = SCIP_REFERENCE * layer.energy
    assert minimum == pytest.approx(of_mask, abs=slack, rel=0)
    if width <= 10:
        enumerated = equations.enumerated_minimum(NM(2, 4))
        assert minimum == pytest.approx(enumerated, abs=slack, rel=0)
    for name in choosers(problem):
        weight = lw.solve(problem, name).weight
        assert equations.objective(weight) >= minimum - slack, name

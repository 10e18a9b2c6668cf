"""The exported CVXPY model states the same problem, with a bound on weights that holds."""

import sys

import cvxpy
import pytest
import torch

import layerwise as lw
from layerwise.cvxpy_model import _weight_bounds
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from tests.support.problems import PROBLEMS, make_layer
from tests.support.reference import Equations, scip_minimum
from tests.support.tolerances import (
    CLARABEL_OPTIONS,
    REFIT_REFERENCE,
    ROUNDING,
    SCIP_REFERENCE,
)


@pytest.mark.parametrize("name", ["plain", "drifted", "few-tokens", "odd-width", "one-row"])
def test_fixed_mask_is_a_quadratic_program(name: str) -> None:
    layer = PROBLEMS[name]
    mask = Unstructured(0.5).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    model = problem.to_cvxpy()
    assert model.is_qp()
    assert not model.is_mixed_integer()
    value = model.solve(solver=cvxpy.CLARABEL, **CLARABEL_OPTIONS)
    refit = lw.solve(problem, "least-squares")
    expected = float(objective_rows(problem, refit.weight, damped=True).sum())
    assert value == pytest.approx(expected, abs=REFIT_REFERENCE * layer.energy, rel=0)
    (weight,) = model.variables()
    assert weight.name() == "weight"
    assert weight.shape == layer.shape


def test_objective_of_the_model_is_the_damped_objective() -> None:
    layer = PROBLEMS["drifted"]
    problem = layer.problem(NM(2, 4), damping=0.1)
    model = problem.to_cvxpy()
    weight = next(entry for entry in model.variables() if entry.name() == "weight")
    for seed in (1, 2):
        other = make_layer(seed, *layer.shape).weight
        weight.value = other.numpy()
        expected = float(objective_rows(problem, other, damped=True).sum())
        slack = ROUNDING * layer.magnitude(other)
        assert model.objective.value == pytest.approx(expected, abs=slack, rel=0)


SMALL: list[Pattern] = [Unstructured(0.5), Unstructured(0.5, "layer"), NM(1, 3)]


@pytest.mark.parametrize("pattern", SMALL, ids=str)
def test_choice_of_the_mask_is_a_mixed_integer_program(pattern: Pattern) -> None:
    layer = make_layer(91, rows=2, width=6, drift=0.3, correlation=0.8)
    problem = layer.problem(pattern)
    assert problem.to_cvxpy().is_mixed_integer()
    value, mask = scip_minimum(problem)
    assert pattern.accepts(mask)
    expected = Equations(layer).enumerated_minimum(pattern)
    assert value == pytest.approx(expected, abs=SCIP_REFERENCE * layer.energy, rel=0)


@pytest.mark.parametrize("name", ["drifted", "correlated", "few-tokens", "plain"])
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4)]
)
def test_weights_that_beat_the_known_mask_obey_the_bound(
    name: str, pattern: Pattern
) -> None:
    layer = PROBLEMS[name]
    problem = layer.problem(pattern)
    everything = FixedMask(torch.ones(layer.shape, dtype=torch.bool))
    center = lw.solve(problem.with_pattern(everything), "least-squares").weight
    bound = torch.from_numpy(_weight_bounds(problem, center.numpy()))
    for solver in ("sparsegpt", "wanda+least-squares", "magnitude+least-squares"):
        assert bool((lw.solve(problem, solver).weight.abs() <= bound).all())
    assert bool((bound > center.abs()).all())


def test_columns_have_no_model() -> None:
    problem = PROBLEMS["plain"].problem(Columns(8))
    with pytest.raises(InvalidProblemError, match="8 columns has no CVXPY model"):
        problem.to_cvxpy()


def test_singular_gram_needs_damping() -> None:
    problem = PROBLEMS["few-tokens"].problem(NM(2, 4), damping=0.0)
    with pytest.raises(InvalidProblemError, match="singular; raise the damping"):
        problem.to_cvxpy()


def test_missing_cvxpy_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    problem = PROBLEMS["plain"].problem(NM(2, 4))
    with pytest.raises(UsageError, match=r'pip install "layerwise\[cvxpy\]"'):
        problem.to_cvxpy()

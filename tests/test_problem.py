"""The problem itself: what is refused, what damping and means do, and its scaling."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import layerwise as lw
from layerwise.evaluate import objective_rows, relative_error, residual
from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.problem import CenteredProblem, LayerProblem
from layerwise.solvers.least_squares import LeastSquares
from tests.support.problems import PROBLEMS, Layer, layers, make_layer
from tests.support.reference import Equations
from tests.support.tolerances import (
    CLOSED_FORM,
    EQUIVARIANCE,
    EXPLICIT,
    ROUNDING,
    SMALL_STEP,
)

HALF = Unstructured(0.5)


# -- the objective ---------------------------------------------------------------------


@given(data=st.data())
def test_objective_from_moments_is_the_definition(data: st.DataObject) -> None:
    layer = data.draw(layers())
    damping = data.draw(st.sampled_from([0.0, 0.01, 1.0]))
    problem = layer.problem(HALF, damping)
    other = make_layer(data.draw(st.integers(0, 99)), *layer.shape).weight
    slack = ROUNDING * layer.magnitude(other)
    found = objective_rows(problem, other)
    torch.testing.assert_close(found, layer.explicit_rows(other), rtol=0, atol=slack)
    equations = torch.from_numpy(Equations(layer, damping).objective_rows(other.numpy()))
    found = objective_rows(problem, other, damped=True)
    # the ridge counts distances from W, weighted by the mean second moment
    slack *= 1 + damping
    torch.testing.assert_close(found, equations, rtol=ROUNDING, atol=slack)


@pytest.mark.parametrize("name", PROBLEMS)
def test_energy_and_drift(name: str) -> None:
    layer = PROBLEMS[name]
    problem = layer.problem(HALF if layer.shape[1] > 1 else Unstructured(0))
    assert problem.energy.dtype == torch.float64
    slack = EXPLICIT[problem.dtype] * layer.energy
    dense = layer.weight.double()
    outputs = dense @ layer.inputs.double()
    energy = outputs.square().mean(dim=1)
    torch.testing.assert_close(problem.energy, energy, rtol=0, atol=slack)
    drift = layer.explicit_rows(dense)
    torch.testing.assert_close(problem.drift, drift, rtol=0, atol=slack)
    # the dense weight costs exactly the drift, whatever the damping
    for damping in (0.0, 1.0):
        cost = objective_rows(problem.with_damping(damping), dense, damped=True)
        assert torch.equal(cost, problem.drift)


def test_small_errors_are_numbers_and_not_remainders() -> None:
    layer = make_layer(2)
    problem = layer.problem(HALF)
    step = make_layer(3).weight * 1e-9
    expected = ((step @ layer.inputs).square().mean(dim=1)).sum()
    found = objective_rows(problem, layer.weight + step).sum()
    assert float(found) == pytest.approx(float(expected), rel=SMALL_STEP)
    assert relative_error(problem, layer.weight) == 0


def test_damping_pulls_towards_the_dense_weight() -> None:
    layer = PROBLEMS["drifted"]
    everything = FixedMask(torch.ones(layer.shape, dtype=torch.bool))
    distances = []
    for damping in (0.0, 1.0, 1e6):
        weight = lw.solve(layer.problem(everything, damping), "least-squares").weight
        distances.append(float((weight - layer.weight).norm()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] <= float(layer.weight.norm()) / 1e5
    same = replace(layer, pruned_inputs=None).problem(everything, 1.0)
    assert torch.equal(lw.solve(same, "least-squares").weight, layer.weight)


def test_damped_moments_and_target() -> None:
    layer = PROBLEMS["drifted"]
    problem = layer.problem(HALF, 0.1)
    seen, inputs, weight = layer.seen, layer.inputs, layer.weight
    ridge = 0.1 * float((seen @ seen.T / 48).diagonal().mean())
    assert problem.ridge == pytest.approx(ridge, rel=ROUNDING)
    gram, target = problem.damped()
    expected = seen @ seen.T / 48 + ridge * torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(gram, expected)
    torch.testing.assert_close(target, weight @ (inputs @ seen.T / 48) + ridge * weight)
    torch.testing.assert_close(problem.target, weight @ (inputs @ seen.T / 48))
    other = make_layer(8).weight
    torch.testing.assert_close(residual(problem, other), target - other @ gram)


def test_residual_is_minus_half_the_gradient() -> None:
    problem = PROBLEMS["drifted"].problem(HALF, 0.1)
    weight = make_layer(9).weight.requires_grad_()
    objective_rows(problem, weight, damped=True).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    torch.testing.assert_close(
        residual(problem, weight.detach()),
        -weight.grad / 2,
        rtol=CLOSED_FORM[torch.float64],
        atol=0,
    )


def test_relative_error_of_a_silent_layer() -> None:
    layer = make_layer(4)
    silent = replace(layer, weight=torch.zeros_like(layer.weight)).problem(HALF)
    assert relative_error(silent, silent.weight) == 0
    assert relative_error(silent, layer.weight) == float("inf")


# -- derived problems ------------------------------------------------------------------


def test_moments_are_shared_and_nothing_is_changed() -> None:
    problem = PROBLEMS["plain"].problem(HALF)
    other = problem.with_damping(0.5)
    assert other.moments is problem.moments
    assert (problem.damping, other.damping) == (0.01, 0.5)
    assert problem.with_pattern(NM(2, 4)).pattern == NM(2, 4)
    assert problem.pattern is HALF
    raised = PROBLEMS["few-tokens"].problem(HALF, 0.0).factorized()
    assert raised[0].damping == raised[1].damping > 0
    assert problem.factorized()[0] is problem


def test_rows_of_a_fixed_mask() -> None:
    layer = PROBLEMS["drifted"]
    mask = HALF.mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    part = problem.rows(torch.tensor([4, 1]))
    assert torch.equal(part.weight, layer.weight[[4, 1]])
    assert torch.equal(part.energy, problem.energy[[4, 1]])
    assert part.pattern.accepts(mask[[4, 1]])
    assert part.moments is problem.moments


@pytest.mark.parametrize("exponent", [-50, -3, 0, 5, 50])
def test_normalized_is_an_exact_scaling(exponent: int) -> None:
    layer = PROBLEMS["drifted"].scaled(2.0**exponent)
    problem = layer.problem(HALF)
    unit, power = problem.normalized()
    assert power % 2 == 0
    assert 0.5 <= unit.moments.mean_diagonal < 2
    assert torch.equal(unit.gram * 2.0**power, problem.gram)
    assert torch.equal(unit.cross_gram * 2.0**power, problem.cross_gram)
    assert torch.equal(unit.energy * 2.0**power, problem.energy)
    mean, unit_mean = problem.moments.input_mean, unit.moments.input_mean
    assert mean is not None
    assert unit_mean is not None
    assert torch.equal(unit_mean * 2.0 ** (power // 2), mean)
    again, none = unit.normalized()
    assert again is unit
    assert none == 0


def test_working_precision() -> None:
    layer = make_layer(5)
    for given_dtype, working in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        problem = layer.to(given_dtype).problem(HALF)
        assert problem.dtype == working
        assert problem.weight.dtype == given_dtype
        assert problem.gram.dtype == torch.float64
        assert problem.damped()[0].dtype == working


# -- means and bias --------------------------------------------------------------------


def with_offset(drift: float) -> Layer:
    layer = make_layer(6, rows=3, width=8, tokens=60, drift=drift)
    offset = torch.linspace(-2, 3, 8, dtype=torch.float64)[:, None]
    other = None if layer.pruned_inputs is None else layer.pruned_inputs - offset / 2
    return Layer(layer.weight, layer.inputs + offset, other)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_centered_refit_is_regression_with_intercept(drift: float) -> None:
    layer = with_offset(drift)
    mask = HALF.mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask), damping=0.0)
    centered = problem.centered()
    assert isinstance(centered, CenteredProblem)
    solution = lw.solve(centered, "least-squares")
    outputs = layer.weight @ layer.inputs
    assert solution.bias is not None
    for row, kept in enumerate(mask):
        design = torch.cat([layer.seen[kept], torch.ones(1, 60, dtype=torch.float64)]).T
        expected = torch.linalg.lstsq(design, outputs[row]).solution
        found = torch.cat([solution.weight[row, kept], solution.bias[row : row + 1]])
        torch.testing.assert_close(found, expected, rtol=EQUIVARIANCE, atol=EQUIVARIANCE)
    shifted = solution.weight @ layer.seen + solution.bias[:, None]
    explicit = float((outputs - shifted).square().sum() / 60)
    assert solution.objective == pytest.approx(explicit, rel=CLOSED_FORM[torch.float64])
    plain = lw.solve(problem, "least-squares")
    assert plain.bias is None
    assert solution.objective < plain.objective


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "fista"])
def test_bias_is_the_best_shift(solver: str) -> None:
    layer = with_offset(0.3)
    solution = lw.solve(layer.problem(NM(2, 4)).centered(), solver)
    error = layer.weight @ layer.inputs - solution.weight @ layer.seen
    assert solution.bias is not None
    torch.testing.assert_close(solution.bias, error.mean(dim=1))
    left = (error - error.mean(dim=1, keepdim=True)).square().sum() / 60
    assert solution.objective == pytest.approx(float(left), rel=CLOSED_FORM[torch.float64])


def test_bias_follows_the_scale_of_the_inputs() -> None:
    layer = with_offset(0.3)
    problem = layer.problem(NM(2, 4)).centered()
    scaled = layer.scaled(2.0**21).problem(NM(2, 4)).centered()
    bias, larger = (lw.solve(entry, "fista").bias for entry in (problem, scaled))
    assert bias is not None
    assert larger is not None
    assert torch.equal(larger, bias * 2.0**21)


def test_constant_channel_moves_into_the_bias() -> None:
    layer = with_offset(0.0)
    inputs = layer.inputs.clone()
    inputs[2] = 3.7
    layer = replace(layer, inputs=inputs).to(torch.float32)
    solution = lw.solve(layer.problem(NM(2, 4)).centered(), "wanda")
    assert not solution.mask[:, 2].any()
    error = (layer.weight @ layer.inputs - solution.weight @ layer.inputs).double()
    assert solution.bias is not None
    slack = EXPLICIT[torch.float32] * float(error.abs().max())
    torch.testing.assert_close(solution.bias, error.mean(dim=1), rtol=0, atol=slack)


def test_rows_keep_what_is_known_of_the_data() -> None:
    layer = make_layer(91, rows=6, width=9, drift=0.3)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    picked = torch.tensor([4, 1])
    known = {"target": problem.target, "shift": problem.shift, "drift": problem.drift}
    part = problem.rows(picked)
    for name, value in known.items():
        assert value is not None
        torch.testing.assert_close(vars(part)[name], value[picked], rtol=0, atol=0)
    same = make_layer(92, rows=6, width=9).problem(FixedMask(mask))
    assert same.shift is None
    assert vars(same.rows(picked))["shift"] is None


def test_parameters_of_a_model_leave_no_graph_behind() -> None:
    layer = PROBLEMS["drifted"]
    parameter = replace(layer, weight=torch.nn.Parameter(layer.weight))
    mask = FixedMask(Unstructured(0.5).mask(layer.weight.abs()))
    problem = parameter.problem(mask)
    for value in (problem.weight, problem.energy, problem.shift, problem.target):
        assert value is not None
        assert not value.requires_grad
    expected = layer.problem(mask)
    assert torch.equal(problem.energy, expected.energy)
    for method in ("direct", "cg"):
        solver = LeastSquares(method=method)
        found = lw.solve(problem, solver).weight
        assert not found.requires_grad
        assert torch.equal(found, lw.solve(expected, solver).weight)
    posed = LayerProblem(parameter.weight, problem.moments, mask, problem.energy)
    assert not posed.weight.requires_grad


def test_a_drift_is_taken_as_it_is_next_to_an_energy() -> None:
    layer = PROBLEMS["drifted"]
    known = layer.problem(Unstructured(0.5))
    drift = known.drift * (1 + 1e-9)  # less than its cancellation would show
    problem = LayerProblem.from_moments(
        layer.weight,
        known.moments,
        pattern=known.pattern,
        energy=known.energy,
        drift=drift,
    )
    assert torch.equal(problem.drift, drift)
    assert torch.equal(problem.energy, known.energy)

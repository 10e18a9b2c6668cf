"""Whole columns: scores by their definition, restorations by closed forms and CVXPY."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import cvxpy
import pytest
import torch

import layerwise as lw
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import Columns, FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solver import requirements
from layerwise.solvers import get_solver
from layerwise.solvers.columns import RESTORATIONS, ColumnPruning
from layerwise.solvers.refit.joint_removal import remove_jointly
from tests.support.columns import (
    HALF,
    LAYERS,
    damped,
    every_layer,
    restored,
    solver,
    some_columns,
    with_offset,
)
from tests.support.problems import PROBLEMS, Layer, make_layer
from tests.support.tolerances import (
    CLARABEL_OPTIONS,
    CLOSED_FORM,
    EQUIVARIANCE,
    EXPLICIT,
    REFIT_REFERENCE,
    REFIT_STATIONARITY,
    ROUNDING,
)

# -- restorations ----------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize("keep", [1, 8, 15, 16])
def test_restoration_never_increases_the_error(layer: Layer, keep: int) -> None:
    found = {kind: restored(layer, kind, keep) for kind in RESTORATIONS}
    slack = EXPLICIT[torch.float32] * layer.energy
    for less, more in (
        ("none", "bias"),
        ("none", "least-squares"),
        ("bias", "intercept"),
    ):
        assert torch.equal(found[less].mask, found[more].mask)
        assert found[more].objective <= found[less].objective + slack
    # a bias is never worse, each at its own damping
    values = [damped(layer, found[kind]) for kind in ("least-squares", "intercept")]
    assert values[1] <= values[0] + slack


@pytest.mark.parametrize("name", ["plain", "drifted", "correlated"])
def test_restorations_differ(name: str) -> None:
    found = [restored(LAYERS[name], kind).objective for kind in RESTORATIONS]
    assert min(abs(one - other) for one, other in pairwise(sorted(found))) > 0
    assert found[3] == min(found)


@every_layer
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_normal_equations_hold(layer: Layer, damping: float) -> None:
    if layer is LAYERS["few-tokens"]:
        damping = max(damping, 1e-6)
    for kind in ("least-squares", "intercept"):
        problem = layer.problem(HALF, damping)
        solution = lw.solve(problem, solver("wanda", kind))
        measured = layer.centered() if kind == "intercept" else layer
        seen, inputs = measured.seen.double(), measured.inputs.double()
        weight, dense = solution.weight.double(), layer.weight.double()
        error = dense @ inputs - weight @ seen
        ridge = damping * float(seen.square().sum()) / seen.numel()
        left = error @ seen.T / seen.shape[1] + ridge * (dense - weight)
        target = dense @ (inputs @ seen.T) / seen.shape[1]
        limit = max(REFIT_STATIONARITY[problem.dtype], EXPLICIT[problem.dtype])
        kept = solution.mask[0]
        assert float(left[:, kept].abs().max()) <= limit * float(target.abs().max())
        assert solution.certificate is not None
        assert solution.certificate.kind == "refit"


@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["least-squares", "intercept"])
def test_refits_against_cvxpy(drift: float, kind: str) -> None:
    layer = with_offset(rows=3, width=8, tokens=30, drift=drift)
    problem = layer.problem(some_columns(layer, keep=4))
    solution = lw.solve(problem, solver("wanda", kind))
    posed = problem.centered() if kind == "intercept" else problem
    value = posed.to_cvxpy().solve(solver=cvxpy.CLARABEL, **CLARABEL_OPTIONS)
    found = float(objective_rows(posed, solution.weight, damped=True).sum())
    assert found == pytest.approx(value, abs=REFIT_REFERENCE * layer.energy, rel=0)
    assert solution.status is Status.OPTIMAL


@pytest.mark.parametrize("kind", ["bias", "intercept"])
def test_biases_against_cvxpy(kind: str) -> None:
    """From explicit tokens, without damping: weights and bias, or the bias alone."""
    layer = with_offset(rows=3, width=8, tokens=30, drift=0.3)
    pattern = some_columns(layer, keep=4)
    solution = lw.solve(layer.problem(pattern, 0.0), solver("wanda", kind))
    kept, outputs = pattern.kept[0].numpy(), (layer.weight @ layer.inputs).numpy()
    bias = cvxpy.Variable((3, 1))
    weight: Any = layer.weight.numpy()[:, kept]
    if kind == "intercept":
        weight = cvxpy.Variable((3, 4))
    error = outputs - weight @ layer.seen.numpy()[kept] - bias @ torch.ones(1, 30).numpy()
    model = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(error) / 30))
    value = model.solve(solver=cvxpy.CLARABEL, **CLARABEL_OPTIONS)
    slack = REFIT_REFERENCE * layer.energy
    assert solution.objective == pytest.approx(value, abs=slack, rel=0)
    assert solution.bias is not None
    explicit = layer.explicit(solution.weight, solution.bias)
    assert explicit == pytest.approx(value, abs=slack, rel=0)


def test_bias_is_the_mean_of_what_left() -> None:
    layer = with_offset()
    solution = lw.solve(layer.problem(HALF), "flap")
    gone = ~solution.mask[0]
    assert solution.bias is not None
    expected = layer.weight[:, gone] @ layer.inputs[gone].mean(dim=1)
    torch.testing.assert_close(solution.bias, expected)
    assert torch.equal(solution.weight, layer.weight * solution.mask)
    problem = layer.problem(HALF)
    for shift in (-0.1, 0.1):
        other = objective_rows(problem, solution.weight, bias=solution.bias + shift)
        assert float(other.sum()) > solution.objective
        explicit = layer.explicit_rows(solution.weight, solution.bias + shift)
        torch.testing.assert_close(other, explicit)


@pytest.mark.parametrize("kind", ["least-squares", "intercept"])
def test_copy_of_a_channel_costs_nothing(kind: str) -> None:
    layer = with_offset()
    inputs = layer.inputs.clone()
    inputs[9] = -2 * inputs[2]
    layer = replace(layer, inputs=inputs)
    kept = torch.ones(layer.shape, dtype=torch.bool)
    kept[:, 9] = False
    problem = layer.problem(FixedMask(kept), damping=0.0)
    solution = lw.solve(problem, solver("wanda", kind))
    assert solution.objective <= ROUNDING * layer.energy
    left = layer.weight[:, 2] - 2 * layer.weight[:, 9]
    torch.testing.assert_close(solution.weight[:, 2], left)
    for score in ("greedy", "swaps", "obs"):
        found = lw.solve(layer.problem(Columns(15), 1e-9), solver(score, kind))
        assert found.mask[0, [2, 9]].sum() == 1
        assert found.objective <= EQUIVARIANCE * layer.energy


def test_joint_removal_is_the_same_restoration() -> None:
    layer = with_offset()
    solution = restored(layer, "least-squares")
    inverse = torch.linalg.inv(layer.problem(HALF).damped()[0])
    expected, loss = remove_jointly(layer.weight, inverse, solution.mask)
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=EQUIVARIANCE)
    assert damped(layer, solution) == pytest.approx(float(loss.sum()))


@every_layer
def test_refit_is_that_of_least_squares(layer: Layer) -> None:
    pattern = some_columns(layer)
    problem = layer.problem(pattern)
    shared, by_row = (
        lw.solve(problem, name)
        for name in (solver("wanda", "least-squares"), "least-squares")
    )
    slack = CLOSED_FORM[problem.dtype]
    torch.testing.assert_close(shared.weight, by_row.weight, rtol=slack, atol=slack)


def test_singular_gram_raises_the_damping() -> None:
    layer = with_offset(tokens=5)
    solution = lw.solve(layer.problem(HALF, damping=0.0), "columns")
    assert solution.stats["damping"] > 0
    assert torch.isfinite(solution.weight).all()
    alone = lw.solve(layer.problem(Columns(2), damping=0.0), "columns")
    assert alone.stats["damping"] == 0  # two kept columns are independent


@pytest.mark.parametrize("name", ["columns", "fasp", "flap", "wanda-sp"])
def test_constant_inputs(name: str) -> None:
    layer = Layer(make_layer(1).weight, torch.ones(16, 4, dtype=torch.float64))
    solution = lw.solve(layer.problem(HALF), name)
    assert HALF.accepts(solution.mask)
    if solution.bias is not None:
        assert solution.objective == 0
        explicit = layer.explicit(solution.weight, solution.bias)
        assert explicit <= ROUNDING * layer.energy


# -- what is posed ---------------------------------------------------------------------


@pytest.mark.parametrize("restoration", RESTORATIONS)
def test_fixed_columns_are_only_restored(restoration: str) -> None:
    layer = with_offset(drift=0.3)
    pattern = some_columns(layer)
    found = [
        lw.solve(layer.problem(pattern), solver(score, restoration))
        for score in ("wanda", "swaps")
    ]
    assert torch.equal(found[0].weight, found[1].weight)
    refits = restoration in ("least-squares", "intercept")
    assert found[0].status is (Status.OPTIMAL if refits else Status.FEASIBLE)
    ragged = pattern.kept.clone()
    ragged[0] ^= True
    with pytest.raises(InvalidProblemError, match="columns does not handle the pattern"):
        lw.solve(layer.problem(FixedMask(ragged)), solver("wanda", restoration))


@pytest.mark.parametrize("score", ["wanda", "wifv", "greedy", "swaps"])
def test_heads_keep_equal_numbers_of_whole_units(score: str) -> None:
    layer = with_offset(drift=0.3)
    units, heads = torch.arange(16) % 8, torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    solution = lw.solve(layer.problem(Columns(2, units, heads)), solver(score, "intercept"))
    kept = [bool(solution.mask[0, units == unit].all()) for unit in range(8)]
    gone = [not solution.mask[0, units == unit].any() for unit in range(8)]
    assert all(a != b for a, b in zip(kept, gone, strict=True))
    assert sorted(heads[kept].tolist()) == [0, 0, 1, 1]


def test_swaps_start_from_the_mask_before() -> None:
    layer = with_offset(drift=0.3, correlation=0.8)
    problem = layer.problem(HALF)
    start = lw.solve(problem, "magnitude-sp")
    chained = lw.solve(problem, lw.chain("magnitude-sp", "columns"))
    refit = lw.solve(problem.with_pattern(FixedMask(start.mask)), "columns")
    assert damped(layer, chained) <= damped(layer, refit)
    frozen = lw.chain("magnitude-sp", ColumnPruning(rounds=0))
    assert torch.equal(lw.solve(problem, frozen).mask, start.mask)
    assert chained.bias is not None


def test_rounds_are_reported() -> None:
    layer = with_offset(drift=0.3, correlation=0.8)
    problem = layer.problem(HALF)
    seen: list[Mapping[str, float]] = []
    start = lw.solve(problem, "magnitude-sp")
    solution = lw.solve(problem, "columns", initial=start, on_iteration=seen.append)
    assert list(solution.history) == seen
    assert solution.iterations == len(seen) > 0
    assert damped(layer, solution) == pytest.approx(seen[-1]["objective"])


def test_problem_about_the_means_has_a_bias_already() -> None:
    layer = with_offset(drift=0.3)
    problem = layer.problem(HALF)
    for centered, posed in (("none", "bias"), ("least-squares", "intercept")):
        about = lw.solve(problem.centered(), solver("wifv", centered))
        both = lw.solve(problem.centered(), solver("wifv", posed))
        found = lw.solve(problem, solver("wifv", posed))
        assert found.bias is not None
        for other in (about, both):
            assert other.bias is not None
            torch.testing.assert_close(other.bias, found.bias)
            assert other.objective == pytest.approx(found.objective)


@dataclass(frozen=True)
class WrongBias:
    """A user's own method that counts on a bias and computes it badly."""

    def solve(self, problem: LayerProblem) -> Any:
        mask = HALF.mask(problem.weight.abs())
        bias = torch.full((len(mask),), 1e3, dtype=torch.float64)
        weight = torch.where(mask, problem.weight, 0)
        return Solution(weight, mask, 0.0, 0.0, Status.FEASIBLE, bias=bias)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_bias_is_computed_and_graded_by_us(drift: float) -> None:
    layer = with_offset(drift=drift).scaled(2.0**9)
    solution = lw.solve(layer.problem(HALF), WrongBias())
    error = layer.weight @ layer.inputs - solution.weight @ layer.seen
    assert solution.bias is not None
    torch.testing.assert_close(solution.bias, error.mean(dim=1))
    explicit = layer.explicit(solution.weight, solution.bias)
    assert solution.objective == pytest.approx(explicit)
    # relative to the energy of the problem as posed, not to that about the means
    assert solution.relative_error == pytest.approx((explicit / layer.energy) ** 0.5)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_objective_of_any_bias_is_its_definition(drift: float) -> None:
    layer = with_offset(drift=drift)
    problem = layer.problem(HALF)
    other, bias = make_layer(3).weight, torch.linspace(-4, 4, 6, dtype=torch.float64)
    found = objective_rows(problem, other, bias=bias)
    torch.testing.assert_close(found, layer.explicit_rows(other, bias))
    ridge = objective_rows(problem, other, bias=bias, damped=True) - found
    distance = (other - layer.weight).square().sum(dim=1)
    torch.testing.assert_close(ridge, problem.ridge * distance)


def test_statistics_that_are_missing() -> None:
    layer = PROBLEMS["plain"]
    moments = lw.Moments(layer.problem(HALF).gram)
    problem = LayerProblem.from_moments(layer.weight, moments, pattern=HALF)
    for name in ("columns", "flap"):
        assert "mean" in requirements(get_solver(name))
        with pytest.raises(InvalidProblemError, match="needs the means of the inputs"):
            lw.solve(problem, name)
    for name in ("fasp", "wanda-sp", "magnitude-sp"):
        assert "mean" not in requirements(get_solver(name))
        assert lw.solve(problem, name).bias is None
    assert requirements(get_solver("magnitude-sp")) == set()


@pytest.mark.parametrize(
    "options",
    [
        {"score": "best"},
        {"restoration": "full"},
        {"step": 0},
        {"rounds": -1},
        {"tolerance": float("nan")},
    ],
    ids=str,
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        ColumnPruning(**options)


def test_presets() -> None:
    made = {
        name: (get_solver(name).score, get_solver(name).restoration)  # type: ignore[attr-defined]
        for name in ("columns", "fasp", "flap", "wanda-sp", "magnitude-sp")
    }
    assert made == {
        "columns": ("swaps", "intercept"),
        "fasp": ("wanda", "least-squares"),
        "flap": ("wifv", "bias"),
        "wanda-sp": ("wanda", "none"),
        "magnitude-sp": ("magnitude", "none"),
    }


@pytest.mark.parametrize("method", ["columns", "flap"])
@pytest.mark.parametrize("spread", [2e-3, 5e-3, 2e-2])
def test_inputs_that_hardly_vary_are_no_error(method: str, spread: float) -> None:
    """Their variances are rests of float32 products, and not exactly those of a gram."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(16, 1000, generator=generator)
        inputs[3] = 1 + spread * inputs[5]
        inputs[7] = -3 * inputs[3]
        weight = torch.randn(4, 16, generator=generator)
        problem = LayerProblem.from_inputs(weight, inputs, pattern=Columns(8))
        assert lw.solve(problem, method).relative_error < 1

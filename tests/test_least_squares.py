"""The refit: both inner solvers, unequal rows, and the honesty of its status."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import layerwise as lw
from layerwise.certificates import refit_certificate
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import FixedMask, Unstructured
from layerwise.solution import Status
from layerwise.solvers.least_squares import LeastSquares, direct_pays
from layerwise.solvers.refit.conjugate_gradients import SupportSolver
from tests.support.problems import (
    PROBLEMS,
    Layer,
    layers,
    make_layer,
    patterns,
    uneven_mask,
)
from tests.support.reference import Equations
from tests.support.tolerances import CLOSED_FORM, EQUIVARIANCE, REFIT_REFERENCE, ROUNDING


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", ["direct", "cg", "auto"])
@pytest.mark.parametrize("side", ["support", "complement", "auto"])
def test_against_an_orthogonal_factorization(name: str, method: Any, side: Any) -> None:
    layer = PROBLEMS[name].to(torch.float64)
    mask = uneven_mask(layer)
    solver = LeastSquares(method=method, side=side)
    solution = lw.solve(layer.problem(FixedMask(mask)), solver)
    equations = Equations(layer)
    weight = equations.least_squares(mask)
    assert solution.status is Status.OPTIMAL
    best = equations.objective_rows(weight).sum()
    slack = REFIT_REFERENCE * best + ROUNDING * layer.energy
    assert equations.objective(solution.weight) == pytest.approx(best, abs=slack, rel=0)
    if method == "direct":
        limit = EQUIVARIANCE * np.abs(weight).max()
        np.testing.assert_allclose(solution.weight.numpy(), weight, rtol=0, atol=limit)
    assert not solution.weight[~mask].any()


def test_rows_without_weights() -> None:
    layer = PROBLEMS["drifted"]
    nothing = FixedMask(torch.zeros(layer.shape, dtype=torch.bool))
    for method in ("direct", "cg", "auto"):
        solver = LeastSquares(method=method)
        solution = lw.solve(layer.problem(nothing), solver)
        assert not solution.weight.any()
        assert solution.status is Status.OPTIMAL
        assert solution.relative_error == pytest.approx(1.0, rel=ROUNDING)
        mixed = uneven_mask(layer)
        assert not lw.solve(layer.problem(FixedMask(mixed)), solver).weight[-1].any()


def recorded_rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List that gets the numbers of rows that each run of cg begins with."""
    rounds = []
    solve_on = SupportSolver.solve

    def record(self: SupportSolver, mask: Tensor, *args: Any, **options: Any) -> Any:
        rounds.append(len(mask))
        return solve_on(self, mask, *args, **options)

    monkeypatch.setattr(SupportSolver, "solve", record)
    return rounds


def test_only_fixed_masks() -> None:
    with pytest.raises(InvalidProblemError, match="for a fixed mask"):
        lw.solve(PROBLEMS["plain"].problem(Unstructured(0.5)), LeastSquares())


def test_iterations_too_few_are_admitted() -> None:
    layer = PROBLEMS["correlated"]
    problem = layer.problem(FixedMask(uneven_mask(layer)), damping=1e-6)
    stopped = lw.solve(problem, LeastSquares(method="cg", max_iterations=1))
    assert stopped.status is Status.MAX_ITERATIONS
    assert stopped.certificate is not None
    assert stopped.certificate.bound > LeastSquares().tolerance
    assert not stopped.weight[~stopped.mask].any()


def test_direct_rescues_rows_that_cg_missed() -> None:
    # wide and half full rows, for which cg is the cheaper choice
    layer = make_layer(62, rows=2, width=220, tokens=400, correlation=0.9)
    mask = torch.ones(layer.shape, dtype=torch.bool)
    mask[:, ::2] = False
    problem = layer.problem(FixedMask(mask))
    assert LeastSquares()._methods(problem, mask) == ("cg", "direct")
    solution = lw.solve(problem, LeastSquares(max_iterations=2))
    assert solution.status is Status.OPTIMAL
    alone = lw.solve(problem, LeastSquares(method="cg", max_iterations=2))
    assert alone.status is Status.MAX_ITERATIONS


def test_looser_tolerance_stops_earlier_and_says_so() -> None:
    layer = PROBLEMS["correlated"]
    problem = layer.problem(FixedMask(uneven_mask(layer)))
    mask = problem.pattern.mask(layer.weight)
    start = lw.solve(problem, "magnitude")
    loose = LeastSquares(tolerance=math.inf).solve(problem, initial=start)
    assert torch.equal(loose.weight, torch.where(mask, layer.weight, 0))
    assert loose.status is Status.OPTIMAL
    assert loose.certificate is not None
    assert loose.certificate.bound > LeastSquares().tolerance


def test_full_mask_returns_the_dense_weight() -> None:
    for name in ("plain", "plain-float32", "dead-channel", "few-tokens"):
        layer = PROBLEMS[name]
        layer = Layer(layer.weight, layer.inputs)
        everything = FixedMask(torch.ones(layer.shape, dtype=torch.bool))
        for damping in (0.01, 1.0):
            solution = lw.solve(layer.problem(everything, damping), "least-squares")
            assert torch.equal(solution.weight, layer.weight)
            assert solution.objective == 0


@given(data=st.data())
def test_refit_beats_the_masked_weight(data: st.DataObject) -> None:
    layer = data.draw(layers())
    pattern = data.draw(patterns(layer))
    question = layer.problem(pattern)
    mask = lw.solve(question, "wanda").mask
    refit = lw.solve(question.with_pattern(FixedMask(mask)), "least-squares")
    masked = torch.where(mask, layer.weight, 0)
    value, before = (
        objective_rows(question, weight, damped=True) for weight in (refit.weight, masked)
    )
    assert bool((value <= before * (1 + LeastSquares().tolerance)).all())


@given(data=st.data())
def test_refit_error_grows_with_sparsity(data: st.DataObject) -> None:
    layer = data.draw(layers())
    question = layer.problem(Unstructured(0))
    scores = layer.weight.abs()
    values = []
    for percent in sorted(data.draw(st.lists(st.integers(0, 99), min_size=2, max_size=5))):
        mask = Unstructured(percent / 100).mask(scores)  # each inside the one before
        refit = lw.solve(question.with_pattern(FixedMask(mask)), "least-squares")
        values.append(objective_rows(question, refit.weight, damped=True))
    slack = ROUNDING * question.energy
    for less, more in pairwise(values):
        assert bool((less <= more * (1 + LeastSquares().tolerance) + slack).all())


@given(data=st.data())
def test_closed_form_of_a_joint_removal(data: st.DataObject) -> None:
    """``delta = -w_P [(G^-1)_PP]^-1 (G^-1)_P`` and its loss, for C = G."""
    layer = data.draw(layers(drift=False))
    width = layer.shape[1]
    count = data.draw(st.integers(0, width - 1), label="removed")
    order = torch.randperm(
        width, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    mask = torch.ones(layer.shape, dtype=torch.bool)
    mask[:, order[:count]] = False
    removed = (~mask[0]).nonzero()[:, 0]
    problem = layer.problem(FixedMask(mask), damping=0.1)
    solution = lw.solve(problem, "least-squares")
    inverse = torch.linalg.inv(problem.damped()[0])
    gone = layer.weight[:, removed]
    block = torch.linalg.inv(inverse[removed][:, removed])
    expected = layer.weight - gone @ block @ inverse[removed]
    limit = CLOSED_FORM[torch.float64] * float(layer.weight.abs().max())
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=limit)
    loss = ((gone @ block) * gone).sum(dim=1)
    found = objective_rows(problem, solution.weight, damped=True)
    slack = CLOSED_FORM[torch.float64] * layer.magnitude(layer.weight)
    torch.testing.assert_close(found, loss, rtol=0, atol=slack)


def spoil_iterations(monkeypatch: pytest.MonkeyPatch, weight: float = 1e3) -> None:
    """Make cg return the same weight for every system."""
    monkeypatch.setattr(
        SupportSolver,
        "solve",
        lambda _, mask, *args, **options: (torch.where(mask, weight, 0.0).double(), 1),
    )


@pytest.mark.parametrize("weight", [1e3, math.nan])
def test_a_round_that_makes_a_row_worse_is_dropped(
    weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PROBLEMS["correlated"]
    mask = uneven_mask(layer)
    mask[:, 0] = False  # a row that keeps everything needs no iteration
    problem = layer.problem(FixedMask(mask))
    spoil_iterations(monkeypatch, weight)
    stopped = lw.solve(problem, LeastSquares(method="cg"))
    masked = torch.where(stopped.mask, layer.weight, 0)
    torch.testing.assert_close(stopped.weight, masked, rtol=0, atol=0)
    assert stopped.status is Status.MAX_ITERATIONS


@pytest.mark.parametrize("method", ["direct", "cg"])
def test_certified_is_what_is_returned(method: Any) -> None:
    """Float32 weights, whose rounding a tolerance beyond their precision must show."""
    layer = make_layer(63, rows=6, width=32, tokens=200, drift=0.2).to(torch.float32)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    solution = lw.solve(problem, LeastSquares(method=method, tolerance=1e-20))
    certificate = refit_certificate(problem, solution.weight, mask)
    assert solution.certificate is not None
    assert solution.certificate.bound == pytest.approx(certificate.bound, rel=1e-6)
    assert solution.status is Status.MAX_ITERATIONS


@pytest.mark.parametrize(("sparsity", "better"), [(0.3, 1), (0.8, 0)])
def test_cg_takes_the_side_with_fewer_iterations(sparsity: float, better: int) -> None:
    layer = make_layer(68, rows=6, width=128, tokens=300, condition=1e3, drift=0.1)
    mask = Unstructured(sparsity).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    sides: tuple[Any, ...] = ("support", "complement", "auto")
    taken = [
        lw.solve(problem, LeastSquares(method="cg", side=side)).iterations for side in sides
    ]
    assert taken[better] < taken[1 - better]
    assert taken[2] == taken[better]


def test_both_sides_share_the_moments() -> None:
    layer = make_layer(73, rows=6, width=64, tokens=200)
    problem = layer.problem(FixedMask(Unstructured(0.5).mask(layer.weight.abs())))
    sides: tuple[Any, ...] = ("support", "complement", "support")
    weights = []
    for side in sides:
        found = lw.solve(problem, LeastSquares(method="cg", rank=0, side=side))
        assert found.status is Status.OPTIMAL
        weights.append(found.weight)
    torch.testing.assert_close(weights[0], weights[2], rtol=0, atol=0)


@pytest.mark.parametrize("side", ["support", "complement"])
def test_one_round_of_the_right_length(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that stop early cost another certificate, those that stop late iterations."""
    layer = make_layer(74, rows=8, width=96, tokens=400, condition=300)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    rounds = recorded_rounds(monkeypatch)
    solver = LeastSquares(method="cg", side=side, products="float32")
    solution = lw.solve(layer.problem(FixedMask(mask)), solver)
    assert rounds == [8]
    assert solution.certificate is not None
    assert solver.tolerance / 10 < solution.certificate.bound <= solver.tolerance


@pytest.mark.parametrize("size", [0.0, 1e-3, 100])
def test_any_start_ends_at_the_optimum(size: float) -> None:
    """On complements a start counts if it is proven optimal by what it is itself."""
    layer = make_layer(69, rows=8, width=128, tokens=400, condition=1e3, drift=0.1)
    mask = Unstructured(0.4).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    solver = LeastSquares(method="cg", side="complement")
    cold, best = solver.solve(problem), LeastSquares(method="direct").solve(problem)
    noise = torch.where(mask, make_layer(70, rows=8, width=128).weight, 0)
    noise[0] = 0  # one row is there already
    start = replace(best, weight=best.weight + size * noise)
    found = solver.solve(problem, initial=start)
    assert found.status is Status.OPTIMAL
    torch.testing.assert_close(found.weight[0], best.weight[0], rtol=0, atol=0)
    assert (found.iterations == 0) == (size == 0)
    assert found.iterations <= cold.iterations + 5


def test_a_start_that_is_never_improved_is_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = PROBLEMS["correlated"]
    mask = uneven_mask(layer)
    mask[:, 0] = False  # a row that keeps everything needs no iteration
    problem = layer.problem(FixedMask(mask))
    best = lw.solve(problem, "least-squares")
    noise = torch.where(best.mask, make_layer(72, *layer.shape).weight, 0)
    start = replace(best, weight=best.weight + 1e-3 * noise)
    spoil_iterations(monkeypatch)
    solver = LeastSquares(method="cg", side="complement")
    stopped = solver.solve(problem, initial=start)
    assert stopped.status is Status.MAX_ITERATIONS
    torch.testing.assert_close(stopped.weight, start.weight, rtol=0, atol=0)
    assert stopped.certificate is not None
    proven = refit_certificate(problem, start.weight, start.mask)
    assert stopped.certificate.bound == pytest.approx(proven.bound)


def test_rows_that_are_certified_are_not_solved_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(71, rows=8, width=96, tokens=300, condition=1e4)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    mask[:4, :90] = True  # few unknowns, done at once
    worked = recorded_rounds(monkeypatch)
    solver = LeastSquares(method="cg", side="complement", max_iterations=12)
    solution = lw.solve(layer.problem(FixedMask(mask)), solver)
    assert solution.status is Status.OPTIMAL
    assert worked[:2] == [8, 4]


@pytest.mark.parametrize(("sparsity", "size"), [(0.2, 8), (0.7, 12)])
def test_direct_takes_the_smaller_side(
    sparsity: float, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(66, rows=5, width=40, tokens=200, drift=0.2)
    mask = Unstructured(sparsity).mask(layer.weight.abs())
    sizes = []
    factor = torch.linalg.cholesky_ex

    def record(systems: Tensor, **options: Any) -> Any:
        if systems.dim() == 3:
            sizes.append(systems.shape[-1])
        return factor(systems, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", record)
    solution = lw.solve(layer.problem(FixedMask(mask)), LeastSquares(method="direct"))
    assert solution.status is Status.OPTIMAL
    assert sizes == [size]


def test_matrices_with_the_same_inputs_share_the_preparation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(67, rows=4, width=64, tokens=200)
    prepared = []
    prepare = SupportSolver.__init__

    def record(self: SupportSolver, *args: Any) -> None:
        prepared.append(args)
        prepare(self, *args)

    monkeypatch.setattr(SupportSolver, "__init__", record)
    problem = layer.problem(FixedMask(layer.weight > 0))
    other = replace(problem, weight=problem.weight.flip(0))
    for question in (problem, other, problem.with_damping(0.1)):
        lw.solve(question, LeastSquares(method="cg"))
    assert len(prepared) == 2  # one for each damping


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qr"}, "method"),
        ({"products": "int8"}, "products"),
        ({"rank": -1}, "rank"),
        ({"side": "kept"}, "side"),
    ],
)
def test_unknown_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LeastSquares(**options)


def test_rows_that_keep_nothing_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """On complements they would be the hardest: every multiplier is an unknown."""
    layer = make_layer(76, rows=8, width=96, tokens=300)
    mask = Unstructured(0.3).mask(layer.weight.abs())
    mask[3] = False
    worked = recorded_rounds(monkeypatch)
    solver = LeastSquares(method="cg", side="complement")
    found = lw.solve(layer.problem(FixedMask(mask)), solver)
    assert found.status is Status.OPTIMAL
    assert not found.weight[3].any()
    assert max(worked) == 7


def test_the_price_is_that_of_the_side_that_was_asked_for() -> None:
    layer = make_layer(77, rows=4, width=256, tokens=600)
    problem = layer.problem(FixedMask(Unstructured(0.05).mask(layer.weight.abs())))
    mask = problem.pattern.mask(problem.weight)
    assert direct_pays(problem, mask)
    assert direct_pays(problem, mask, "complement")
    assert not direct_pays(problem, mask, "support")


@pytest.mark.parametrize(
    "options", [{"max_iterations": -1}, {"tolerance": math.nan}, {"memory_budget": 0}]
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(options))} must be at least"):
        LeastSquares(**options)

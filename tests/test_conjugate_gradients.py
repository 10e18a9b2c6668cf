"""Conjugate gradients on many supports: plain, preconditioned, and rounded."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.certificates import RefitState, refit_state
from layerwise.evaluate import objective_rows
from layerwise.patterns import FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.refit.conjugate_gradients import NARROW, SupportSolver
from layerwise.solvers.refit.polish import polish
from tests.support.problems import PROBLEMS, make_layer, uneven_mask
from tests.support.tolerances import ROUNDING

TOLERANCE = 1e-6


def test_polishing_decreases_the_objective_and_ends_at_the_refit() -> None:
    layer = PROBLEMS["correlated"]
    mask = uneven_mask(layer)
    problem = layer.problem(FixedMask(mask))
    gram, target = problem.damped()
    values = []
    for steps in range(17):
        solution = polish(gram, mask, target, steps)
        assert not solution[~mask].any()
        values.append(objective_rows(problem, solution, damped=True))
    slack = ROUNDING * problem.energy
    for before, after in pairwise(values):
        assert bool((after <= before + slack).all())
    refit = lw.solve(problem, "least-squares")
    best = objective_rows(problem, refit.weight, damped=True)
    torch.testing.assert_close(values[-1], best, rtol=1e-6, atol=0)
    assert bool((values[1] > values[2])[:-1].all())


def spiked(dtype: torch.dtype = torch.float32) -> tuple[LayerProblem, Tensor]:
    """A wide layer whose inputs share a few strong directions."""
    layer = make_layer(70, rows=20, width=160, tokens=600)
    mixed = layer.inputs.clone()
    strong = make_layer(71, rows=160, width=5).weight @ make_layer(72, 5, 600).weight
    layer = type(layer)(layer.weight, mixed + 3 * strong).to(dtype)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    return layer.problem(FixedMask(mask)), mask


def corrected(
    problem: LayerProblem,
    mask: Tensor,
    system: SupportSolver,
    limit: int = 300,
    *,
    rounded: bool,
) -> tuple[RefitState, RefitState, int]:
    """Before and after one correction of the masked weight."""
    weight = torch.where(mask, problem.weight, 0).double()
    state = refit_state(problem, weight, mask)
    change, iterations = system.solve(
        mask,
        state.residual,
        state.objective,
        1e-12 * state.energy,
        state.excess,
        TOLERANCE,
        limit,
        rounded=rounded,
    )
    assert not change[~mask].any()
    return state, refit_state(problem, weight + change, mask), iterations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 8])
def test_correction_solves_every_row(dtype: torch.dtype, rank: int) -> None:
    problem, mask = spiked(dtype)
    mask[3], mask[4] = False, True
    system = SupportSolver(problem.damped_gram(dtype), rank, "float32")
    _, state, _ = corrected(problem, mask, system, rounded=False)
    assert float(state.relative.max()) < 10 * TOLERANCE
    assert state.excess[3] == 0


def test_rounded_products_reach_the_same_answer() -> None:
    problem, mask = spiked()
    gram = problem.damped_gram(torch.float32)
    system = SupportSolver(gram, 8, "bfloat16")
    _, state, _ = corrected(problem, mask, system, rounded=True)
    assert float(state.relative.max()) < 10 * TOLERANCE
    rows = problem.weight
    exact = rows @ (gram / system.root / system.root[:, None])
    error = system.product(rows, torch.empty_like(rows), True) - exact
    plain = rows.bfloat16() @ system.gram.bfloat16() - exact
    assert (
        0 < float(error.norm()) < float(plain.norm()) / 4
    )  # only the remainder is rounded
    assert not SupportSolver(gram.double(), 8, "bfloat16").can_round


@pytest.mark.parametrize(
    ("units", "rounds"), [("amx_bf16", True), ("avx512_bf16", True), ("avx2", False)]
)
def test_wide_grams_round_where_the_processor_has_units(
    units: str, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {units: True}, raising=False)
    assert SupportSolver(torch.eye(NARROW), 0).can_round == rounds
    assert not SupportSolver(torch.eye(NARROW - 1), 0).can_round


def test_torch_that_cannot_tell_its_units_rounds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not SupportSolver(torch.eye(NARROW), 0).can_round


def test_shared_directions_save_iterations() -> None:
    problem, mask = spiked()
    gram = problem.damped_gram(torch.float32)
    plain, modelled = (
        corrected(problem, mask, SupportSolver(gram, rank, "float32"), rounded=False)[2]
        for rank in (0, 8)
    )
    assert modelled <= plain / 2


def test_objective_falls_with_every_iteration() -> None:
    problem, mask = spiked(torch.float64)
    system = SupportSolver(problem.damped_gram(torch.float64), 8)
    values = [
        corrected(problem, mask, system, limit, rounded=False)[1].objective
        for limit in range(1, 7)
    ]
    for before, after in pairwise(values):
        assert bool((after < before).all())


def test_dual_objective_rises_with_every_iteration() -> None:
    problem, mask = spiked(torch.float64)
    inverse = torch.linalg.inv(problem.damped_gram(torch.float64))
    system = SupportSolver(inverse, 0)
    weight = torch.where(mask, problem.weight, 0)
    start = refit_state(problem, weight, mask, torch.zeros_like(weight))
    values = []
    for limit in range(7):
        multipliers, _ = system.solve(
            ~mask,
            torch.where(mask, 0, problem.weight),
            start.objective - start.excess,
            0 * start.energy,
            start.excess,
            0.0,
            limit,
            rounded=False,
            rises=True,
        )
        assert not multipliers[mask].any()
        state = refit_state(problem, weight, mask, multipliers)
        values.append(state.objective - state.excess)
    for before, after in pairwise(values):
        assert bool((after > before).all())
    best = lw.solve(problem, "least-squares")
    optimum = objective_rows(problem, best.weight, damped=True)
    assert bool((values[-1] < optimum).all())
    assert bool((values[-1] > optimum / 2).all())


def test_image_is_that_of_the_matrix_as_given() -> None:
    problem, _ = spiked(torch.float64)
    gram = problem.damped_gram(torch.float64)
    expected = problem.weight @ gram
    torch.testing.assert_close(SupportSolver(gram, 8).image(problem.weight), expected)


def test_converged_rows_stay_converged() -> None:
    """Iterations beyond the last digit of the precision do no harm."""
    problem, mask = spiked()
    weight = torch.where(mask, problem.weight, 0).double()
    system = SupportSolver(problem.damped_gram(torch.float32), 8, "float32")
    state = refit_state(problem, weight, mask)
    change, iterations = system.solve(
        mask,
        state.residual,
        state.objective,
        0 * state.energy,
        state.excess,
        0.0,
        500,
        rounded=False,
    )
    assert iterations < 100
    assert float(refit_state(problem, weight + change, mask).relative.max()) < TOLERANCE

"""MaskLoRA of one layer: between start and exact refit, nearer as the rank grows."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.evaluate import objective_rows
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solvers.mask_lora import MaskLoRA
from tests.support.problems import PROBLEMS, make_layer
from tests.support.tolerances import LOW_RANK, WHOLE_CHANGE

NAMES = [name for name in PROBLEMS if "half" not in name]


def posed(name: str) -> tuple[LayerProblem, Solution]:
    """Problem with the mask of Wanda's start, and the start."""
    problem = PROBLEMS[name].problem(lw.Unstructured(0.5))
    start = lw.solve(problem, "wanda")
    return problem.with_pattern(lw.FixedMask(start.mask)), start


def value(problem: LayerProblem, weight: Tensor) -> float:
    return float(objective_rows(problem, weight, damped=True).sum())


def changed(name: str, rank: int) -> tuple[float, float, float, Solution]:
    """Damped objective of the start, of MaskLoRA and of the refit; its solution."""
    problem, start = posed(name)
    found = lw.solve(problem, MaskLoRA(rank=rank), initial=start)
    refit = lw.solve(problem, "least-squares")
    values = (value(problem, w) for w in (start.weight, found.weight, refit.weight))
    return (*values, found)  # type: ignore[return-value]


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_never_better_than_the_refit_and_never_worse_than_the_start(
    name: str, rank: int
) -> None:
    start, found, refit, solution = changed(name, rank)
    assert refit <= found * (1 + LOW_RANK)
    assert found <= start * (1 + LOW_RANK)
    _, wanda = posed(name)
    assert torch.equal(solution.mask, wanda.mask)
    assert bool((solution.weight[~wanda.mask] == 0).all())
    assert solution.status is Status.FEASIBLE


@pytest.mark.parametrize("name", NAMES)
def test_it_approaches_the_refit_as_the_rank_grows(name: str) -> None:
    values = [changed(name, rank)[1] for rank in (1, 2, 4, 16)]
    refit = changed(name, 16)[2]
    assert all(later <= one * (1 + LOW_RANK) for one, later in pairwise(values))
    assert values[-1] <= refit * (1 + WHOLE_CHANGE)


def test_the_change_has_the_rank() -> None:
    problem, start = posed("correlated")
    for rank in (1, 2):
        found = lw.solve(problem, MaskLoRA(rank=rank), initial=start)
        everything = problem.with_pattern(lw.FixedMask(torch.ones_like(start.mask)))
        full = lw.solve(everything, MaskLoRA(rank=rank), initial=start)
        change = full.weight - start.weight
        assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) == rank
        assert not torch.equal(found.weight, full.weight)


def test_alternation_finds_what_descent_on_both_factors_finds() -> None:
    """Against L-BFGS from random factors, the best of several starts."""
    layer = make_layer(3, 8, 12)
    problem = layer.problem(lw.Unstructured(0.5))
    start = lw.solve(problem, "magnitude")
    problem = problem.with_pattern(lw.FixedMask(start.mask))
    found = lw.solve(problem, MaskLoRA(rank=2, tolerance=1e-8, sweeps=500), initial=start)
    ours, best = value(problem, found.weight), float("inf")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        left = torch.randn(8, 2, dtype=torch.float64, generator=generator)
        right = torch.randn(2, 12, dtype=torch.float64, generator=generator)
        best = min(best, _descend(problem, start, left, right))
    assert ours <= best * 1.01


def _descend(problem: LayerProblem, start: Solution, left: Tensor, right: Tensor) -> float:
    factors = [left.requires_grad_(), right.requires_grad_()]
    optimizer: Any = torch.optim.LBFGS(
        factors, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def weight() -> Tensor:
        return start.weight.double() + start.mask * (left @ right)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective_rows(problem, weight(), damped=True).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return value(problem, weight().detach())


def test_every_sweep_gains() -> None:
    problem, start = posed("few-tokens")
    found = lw.solve(problem, MaskLoRA(rank=2, tolerance=0, sweeps=30), initial=start)
    gains = [entry["gain"] for entry in found.history]
    assert all(later >= one * (1 - LOW_RANK) for one, later in pairwise(gains))
    fell = value(problem, start.weight) - value(problem, found.weight)
    assert gains[-1] == pytest.approx(fell, rel=1e-6)


def test_certificate_bounds_the_distance_from_the_refit() -> None:
    problem, start = posed("correlated")
    found = lw.solve(problem, MaskLoRA(rank=1), initial=start)
    refit = lw.solve(problem, "least-squares").weight
    assert found.certificate is not None
    rows = objective_rows(problem, found.weight, damped=True)
    best = objective_rows(problem, refit, damped=True)
    assert float((rows / best - 1).max()) <= found.certificate.bound * (1 + 1e-6)


def test_in_a_chain_it_takes_the_mask_before_it() -> None:
    problem = PROBLEMS["plain"].problem(lw.NM(2, 4))
    found = lw.solve(problem, lw.chain("wanda", MaskLoRA(rank=2)))
    assert torch.equal(found.mask, lw.solve(problem, "wanda").mask)
    with pytest.raises(InvalidProblemError, match="for a fixed mask"):
        lw.solve(problem, MaskLoRA())


@pytest.mark.parametrize("option", ["rank", "sweeps", "inner"])
def test_impossible_options(option: str) -> None:
    zero: dict[str, Any] = {option: 0}
    with pytest.raises(UsageError, match=f"{option} must be at least 1"):
        replace(MaskLoRA(), **zero)

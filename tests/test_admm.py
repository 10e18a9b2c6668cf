"""ADMM and ALPS against slow versions that solve a linear system for every row and step."""

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
from layerwise.solvers.admm import ADMM, ALPS, Scaled
from layerwise.solvers.least_squares import LeastSquares
from tests.support.problems import PROBLEMS, Layer, make_layer
from tests.support.tolerances import EQUIVARIANCE, ROUNDING

LAYERS = {
    "plain": PROBLEMS["plain"],
    "drifted": PROBLEMS["drifted"],
    "few-tokens": PROBLEMS["few-tokens"],
    "one-row": PROBLEMS["one-row"],
    "correlated": make_layer(91, rows=8, width=32, drift=0.2, correlation=0.9),
}
PATTERNS = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4), NM(1, 4), Columns(7)]


def normal_equations(layer: Layer, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled gram, scaled target and the scaling, from explicit inputs."""
    seen, inputs = layer.seen, layer.inputs
    tokens = seen.shape[1]
    gram = seen @ seen.T / tokens
    ridge = damping * gram.diagonal().mean()
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    target = layer.weight @ (inputs @ seen.T / tokens) + ridge * layer.weight
    root = gram.diagonal().sqrt()
    return gram / root / root[:, None], target / root, root


def solve_rows(matrix: Tensor, sides: Tensor) -> Tensor:
    return torch.stack([torch.linalg.solve(matrix, side) for side in sides])


def textbook_admm(layer: Layer, pattern: Pattern, damping: float = 0.1) -> Tensor:
    """20 steps with rho = 1; the sparsity of the mask grows in the first 15."""
    gram, target, root = normal_equations(layer, damping)
    system = gram + torch.eye(len(gram), dtype=gram.dtype)
    weight = layer.weight * root
    copy, dual = torch.zeros_like(weight), torch.zeros_like(weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for step in range(1, 21):
        if step <= 15:
            now = pattern
            if isinstance(pattern, Unstructured):
                reached = pattern.sparsity - pattern.sparsity * (1 - step / 15) ** 3
                now = Unstructured(reached, pattern.group)
            mask = now.mask((weight + dual).abs())
        copy = (weight + dual) * mask
        dual = dual + weight - copy
        weight = solve_rows(system, target + copy - dual)
    return (weight + dual) * mask / root


def textbook_alps(
    layer: Layer, pattern: Pattern, rho: float = 0.1, most: int = 300
) -> tuple[Tensor, Tensor, int]:
    """Mask, sparse copy and steps of the published alternation."""
    gram, target, root = normal_equations(layer, 0.01)
    dense = layer.weight * root
    identity = torch.eye(len(gram), dtype=gram.dtype)
    first = pattern.mask(dense.abs())
    copy, dual, grown = dense * first, torch.zeros_like(dense), False
    before = support = first
    for step in range(1, most + 1):
        weight = solve_rows(gram + rho * identity, target - dual + rho * copy)
        support = pattern.mask((weight + dual / rho).abs())
        copy = (weight + dual / rho) * support
        dual = dual + rho * (weight - copy)
        if step == most:
            return support, copy / root, step
        if step % 3:
            continue
        entered = int((support & ~before).sum())
        share = entered / int(support.sum())
        before = support
        if (entered == 0 and grown) or (step >= 30 and share < 3e-4):
            return support, copy / root, step
        if share > 0.1:
            rho, grown = rho * 1.3, True
        elif share > 0.005:
            rho, grown = rho * 1.2, True
        elif entered and grown:
            rho = rho * 1.1
        else:
            rho = rho / 5
            copy, dual, before = dense * first, torch.zeros_like(dense), first
        rho = min(rho, 1e6)
    return support, copy / root, most


def value(problem: LayerProblem, solution: Solution) -> float:
    return float(objective_rows(problem, solution.weight, damped=True).sum())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_against_the_textbook(name: str, pattern: Pattern) -> None:
    layer = LAYERS[name]
    expected = textbook_admm(layer, pattern)
    solution = lw.solve(layer.problem(pattern), ADMM())
    assert torch.equal(solution.mask, expected != 0)
    torch.testing.assert_close(solution.weight, expected, rtol=0, atol=EQUIVARIANCE)
    assert solution.stats["damping"] == 0.1


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_alps_against_the_textbook(name: str, pattern: Pattern) -> None:
    layer = LAYERS[name]
    problem = layer.problem(pattern)
    for rho, most in ((0.1, 300), (30.0, 300), (0.1, 4), (0.1, 9), (1e4, 3)):
        mask, copy, steps = textbook_alps(layer, pattern, rho, most)
        solver = ALPS(rho=rho, iterations=most)
        solution = lw.solve(problem, solver)
        assert torch.equal(solution.mask, mask)
        assert torch.equal(solver.find(problem), mask)
        assert solution.iterations == steps
        refit = lw.solve(problem.with_pattern(FixedMask(mask)), "least-squares")
        slack = LeastSquares().tolerance * value(problem, refit)
        slack += ROUNDING * layer.energy
        assert value(problem, solution) == pytest.approx(value(problem, refit), abs=slack)
        copied = float(objective_rows(problem, copy, damped=True).sum())
        assert value(problem, solution) <= copied + slack


def test_alps_starts_again_where_rho_was_too_large() -> None:
    layer = LAYERS["correlated"]
    steps = [textbook_alps(layer, Unstructured(0.5), rho)[2] for rho in (0.1, 1e4)]
    assert steps[1] > 3  # it did not stop at the first frozen support
    large = lw.solve(layer.problem(Unstructured(0.5)), ALPS(rho=1e4))
    assert large.iterations == steps[1]


def test_alps_does_not_start_again_after_its_last_step() -> None:
    layer, pattern = LAYERS["correlated"], Unstructured(0.5)
    mask, copy, _ = textbook_alps(layer, pattern, 1e4, 3)
    problem, solver = layer.problem(pattern), ALPS(rho=1e4, iterations=3)
    scaled = Scaled(problem)
    found, scaled_copy, _ = solver._alternate(pattern, scaled)
    weight = scaled.unscaled(scaled_copy, found)
    assert torch.equal(found, mask)
    torch.testing.assert_close(weight, copy, rtol=0, atol=EQUIVARIANCE)
    assert not torch.equal(weight, torch.where(mask, layer.weight, 0))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ten_steps_of_cg_are_no_better_than_the_exact_refit(
    name: str, pattern: Pattern
) -> None:
    layer = LAYERS[name]
    problem = layer.problem(pattern)
    exact, published = lw.solve(problem, ALPS()), lw.solve(problem, ALPS(finish="cg"))
    assert torch.equal(exact.mask, published.mask)
    slack = LeastSquares().tolerance * value(problem, exact) + ROUNDING * layer.energy
    assert value(problem, exact) <= value(problem, published) + slack
    assert exact.certificate is not None
    assert published.certificate is None
    assert (ALPS().guarantee, ALPS(finish="cg").guarantee) == ("certified refit", "none")
    # and they lower the objective of the sparse copy that they start from
    copy = textbook_alps(layer, pattern)[1]
    copied = float(objective_rows(problem, copy, damped=True).sum())
    assert value(problem, published) <= copied + slack


def test_fixed_mask() -> None:
    layer = LAYERS["drifted"]
    mask = Unstructured(0.4).mask(layer.weight)
    problem = layer.problem(FixedMask(mask))
    exact = lw.solve(problem, "alps")
    assert exact.status is Status.OPTIMAL
    refit = lw.solve(problem, "least-squares")
    assert torch.equal(exact.weight, refit.weight)
    for solver in (ADMM(), ALPS(finish="cg")):
        found = lw.solve(problem, solver)
        assert torch.equal(found.mask, mask)
        assert found.status is Status.FEASIBLE
        # its own damping differs, but the weights are no longer the dense ones
        masked = objective_rows(problem, torch.where(mask, layer.weight, 0), damped=True)
        assert value(problem, found) < float(masked.sum())


def test_more_steps_on_a_fixed_mask_converge_to_the_refit() -> None:
    layer = LAYERS["correlated"]
    mask = Unstructured(0.5).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask), damping=0.1)
    refit = value(problem, lw.solve(problem, "least-squares"))
    values = [
        value(problem, lw.solve(problem, ADMM(iterations=steps))) for steps in (5, 20, 2000)
    ]
    assert values[0] > values[1] > values[2]
    assert values[2] == pytest.approx(refit, rel=LeastSquares().tolerance)


@pytest.mark.parametrize("steps", [1, 10])
def test_fewer_steps_than_refreshes_still_reach_the_sparsity(steps: int) -> None:
    for pattern in (Unstructured(0.5), Unstructured(0.5, "layer"), NM(2, 4)):
        solution = lw.solve(LAYERS["drifted"].problem(pattern), ADMM(iterations=steps))
        assert pattern.accepts(solution.mask)


def test_without_steps() -> None:
    layer = LAYERS["drifted"]
    problem = layer.problem(Unstructured(0.5))
    gram = normal_equations(layer, 0.1)[2]
    mask = Unstructured(0.5).mask(layer.weight.abs() * gram)
    for solver in (ADMM(iterations=0), ADMM(mask_iterations=0)):
        assert torch.equal(lw.solve(problem, solver).mask, mask)
    assert torch.equal(
        lw.solve(problem, ADMM(iterations=0)).weight, torch.where(mask, layer.weight, 0)
    )
    scale = normal_equations(layer, 0.01)[2]
    first = Unstructured(0.5).mask(layer.weight.abs() * scale)
    assert torch.equal(lw.solve(problem, ALPS(iterations=0)).mask, first)


def test_damping_that_had_to_be_raised_is_reported() -> None:
    layer = PROBLEMS["duplicate-channel"]
    assert lw.solve(layer.problem(NM(2, 4)), ADMM(damping=0.0)).stats["damping"] > 0
    problem = PROBLEMS["few-tokens"].problem(Unstructured(0.5), damping=0.0)
    for finish in ("exact", "cg"):
        assert lw.solve(problem, ALPS(finish=finish)).stats["damping"] > 0
    assert lw.solve(problem.with_damping(0.3), "alps").stats["damping"] == 0.3
    assert lw.solve(problem.with_damping(0.3), "admm").stats["damping"] == 0.1


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (ADMM, {"rho": 0.0}, "rho must be a number above 0, got 0"),
        (ADMM, {"rho": float("inf")}, "rho must be a number above 0, got inf"),
        (ADMM, {"damping": -0.1}, "damping must be at least 0, got -0.1"),
        (ADMM, {"iterations": -1}, "iterations must be at least 0, got -1"),
        (ADMM, {"mask_iterations": -1}, "mask_iterations must be at least 0, got -1"),
        (ALPS, {"rho": float("nan")}, "rho must be a number above 0, got nan"),
        (ALPS, {"iterations": -1}, "iterations must be at least 0, got -1"),
        (ALPS, {"finish": "pcg"}, "finish is one of exact, cg, got 'pcg'"),
    ],
)
def test_impossible_options(solver: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        solver(**options)


def test_infinite_damping_is_refused() -> None:
    problem = LAYERS["plain"].problem(Unstructured(0.5))
    with pytest.raises(InvalidProblemError, match="damping must be a number"):
        lw.solve(problem, ADMM(damping=float("inf")))

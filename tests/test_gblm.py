"""GBLM: its limits, its units, and where the gradients go."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.gblm import GBLM
from tests.support.problems import PROBLEMS, Layer

HALF = Unstructured(0.5)
PATTERNS = [HALF, Unstructured(0.7, "layer"), NM(2, 4)]
LAYER = PROBLEMS["drifted"]
HUGE = 1e12  # an alpha beside which the input norms do not count


def random_norms(layer: Layer, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(layer.shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_without_gradients_it_is_wanda(pattern: Pattern) -> None:
    problem = LAYER.problem(pattern)
    wanda = lw.solve(problem, "wanda").mask
    assert torch.equal(lw.solve(problem, GBLM(alpha=0.0)).mask, wanda)
    silent = replace(problem, gradient_norm=torch.zeros(problem.shape))
    assert torch.equal(lw.solve(silent, "gblm").mask, wanda)
    other = replace(problem, gradient_norm=random_norms(LAYER))
    assert not torch.equal(lw.solve(other, "gblm").mask, wanda)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_without_activations_it_is_weight_times_gradient(pattern: Pattern) -> None:
    norms = random_norms(LAYER)
    problem = replace(LAYER.problem(pattern), gradient_norm=norms)
    mask = pattern.mask(LAYER.weight.abs() * norms)
    assert torch.equal(lw.solve(problem, GBLM(alpha=HUGE)).mask, mask)


def test_score_is_the_definition() -> None:
    norms = random_norms(LAYER)
    problem = replace(LAYER.problem(HALF), gradient_norm=norms)
    size = LAYER.seen.norm(dim=1) / LAYER.seen.shape[1] ** 0.5
    mask = HALF.mask(LAYER.weight.abs() * (size + 0.7 * norms))
    solution = lw.solve(problem, GBLM(alpha=0.7))
    assert torch.equal(solution.mask, mask)
    assert torch.equal(solution.weight, torch.where(mask, LAYER.weight, 0))


@pytest.mark.parametrize(
    ("options", "alpha"),
    [
        ({}, 100 * 128 / 2048**0.5),
        ({"norm": "l2"}, 25.0),
        ({"scaling": "paper"}, 100.0),
        ({"scaling": "paper", "norm": "l2"}, 100.0),
    ],
    ids=str,
)
def test_default_alpha_is_the_papers_in_each_unit(options: Any, alpha: float) -> None:
    norms = random_norms(LAYER) / alpha  # so that both terms count
    problem = replace(LAYER.problem(HALF), gradient_norm=norms)
    found = lw.solve(problem, GBLM(**options)).mask
    assert torch.equal(found, lw.solve(problem, GBLM(alpha=alpha)).mask)
    for other in (alpha / 2, 2 * alpha):
        assert not torch.equal(found, lw.solve(problem, GBLM(alpha=other)).mask)


def test_channel_times_c_and_its_weights_divided_by_c() -> None:
    """The same function of the model: its gradient grows with the input."""
    problem = LAYER.problem(HALF)
    sizes = 2.0 ** torch.arange(-8, 8, dtype=torch.float64)
    other = Layer(
        LAYER.weight / sizes, LAYER.inputs * sizes[:, None], LAYER.seen * sizes[:, None]
    )
    assert torch.equal(other.gradient_norm, LAYER.gradient_norm * sizes)
    mask = lw.solve(problem, "gblm").mask
    assert torch.equal(lw.solve(other.problem(HALF), "gblm").mask, mask)


@pytest.mark.parametrize("exponent", [-41, 40])
def test_gradients_are_linear_in_the_inputs(exponent: int) -> None:
    """They scale with the inputs, in `normalized` as well; alone they change the mask."""
    norms = random_norms(LAYER).float()
    problem = replace(LAYER.problem(HALF), gradient_norm=norms)
    mask = lw.solve(problem, GBLM(alpha=1.0)).mask
    scaled = LAYER.scaled(2.0**exponent).problem(HALF)
    together = replace(scaled, gradient_norm=norms * 2.0**exponent)
    assert torch.equal(lw.solve(together, GBLM(alpha=1.0)).mask, mask)
    alone = replace(scaled, gradient_norm=norms)
    assert not torch.equal(lw.solve(alone, GBLM(alpha=1.0)).mask, mask)
    unit, power = together.normalized()
    assert power != 0
    assert unit.gradient_norm is not None
    assert torch.equal(unit.gradient_norm * 2.0 ** (power // 2), norms * 2.0**exponent)


def test_problem_hands_the_gradients_on() -> None:
    norms = random_norms(LAYER)
    mask = torch.rand(LAYER.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    problem = replace(LAYER.problem(FixedMask(mask)), gradient_norm=norms)
    order = torch.tensor([4, 1])
    kept = {
        "pattern": problem.with_pattern(HALF),
        "damping": problem.with_damping(0.1),
        "centered": problem.centered(),
        "factorized": problem.factorized()[0],
    }
    for name, other in kept.items():
        assert other.gradient_norm is norms, name
    part = problem.rows(order).gradient_norm
    assert part is not None
    assert torch.equal(part, norms[order])
    without = replace(problem, gradient_norm=None)
    assert without.rows(order).gradient_norm is None
    assert without.normalized()[0].gradient_norm is None


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (torch.ones(6, 15), r"gradient_norm is \(6, 15\), expected a tensor of shape"),
        ([1.0], "gradient_norm must be a tensor or numpy array of .*, got list"),
        (torch.full((6, 16), -1e-9), "contains -.* at row 0, column 0; a norm must"),
        (torch.full((6, 16), float("nan")), "contains nan at row 0"),
        (torch.full((6, 16), float("inf")), "contains inf at row 0"),
    ],
    ids=["shape", "list", "negative", "nan", "inf"],
)
def test_impossible_gradients(norms: Any, message: str) -> None:
    with pytest.raises(InvalidProblemError, match=message):
        LayerProblem.from_inputs(
            LAYER.weight, LAYER.inputs, pattern=HALF, gradient_norm=norms
        )


def test_problem_without_gradients() -> None:
    problem = LayerProblem.from_inputs(LAYER.weight, LAYER.inputs, pattern=HALF)
    for method in ("gblm", GBLM(alpha=0.0), "gblm+least-squares"):
        with pytest.raises(InvalidProblemError, match="give the problem gradient_norm"):
            lw.solve(problem, method)


@pytest.mark.parametrize(
    "options",
    [{"alpha": -1.0}, {"alpha": float("inf")}, {"norm": "l3"}, {"scaling": "sum"}],
    ids=str,
)
def test_impossible_options(options: Any) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        GBLM(**options)

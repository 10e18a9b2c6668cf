"""The spread of eigenvalues, and the side of the masks that follows from it."""

from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.moments import Moments
from layerwise.patterns import FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.refit.spread import spread_on_complements, spread_on_supports
from tests.support.problems import make_layer

WIDTH, ROWS, RANK = 128, 6, 2
PROBED = 0.2  # relative error of sixteen probes


def problem_of(eigenvalues: Tensor, damping: float = 1e-6) -> LayerProblem:
    """Layer whose gram has these eigenvalues on random directions, half of it kept."""
    basis = torch.linalg.qr(make_layer(101, WIDTH, WIDTH).weight)[0]
    gram = (basis * eigenvalues) @ basis.T
    weight = make_layer(102, ROWS, WIDTH).weight
    mask = Unstructured(0.5).mask(weight.abs())
    return LayerProblem.from_moments(
        weight, Moments(gram, n_tokens=1000), pattern=FixedMask(mask), damping=damping
    )


def spectrum(start: float, end: float) -> Tensor:
    """Ones, but for eight eigenvalues from `start` to `end`."""
    values = torch.ones(WIDTH, dtype=torch.float64)
    values[:8] = torch.logspace(start, end, 8, dtype=torch.float64)
    return values


STRONG, WEAK, BROAD = (
    spectrum(2, 1),
    spectrum(-2, -1),
    torch.logspace(0, -2, WIDTH, dtype=torch.float64),
)


def unit_gram(problem: LayerProblem) -> Tensor:
    """Damped gram of unit diagonal."""
    gram = problem.damped_gram(torch.float64)
    root = gram.diagonal().sqrt()
    return gram / root / root[:, None]


def exact(values: Tensor) -> float:
    """Spread of eigenvalues."""
    return float(len(values) * values.square().sum() / values.sum().square())


@pytest.mark.parametrize("eigenvalues", [STRONG, WEAK, BROAD])
@pytest.mark.parametrize("damping", [1e-6, 0.1])
def test_spreads_are_those_of_the_eigenvalues(eigenvalues: Tensor, damping: float) -> None:
    problem = problem_of(eigenvalues, damping)
    values = torch.linalg.eigvalsh(unit_gram(problem)).flip(0)
    assert spread_on_supports(problem, 0) == pytest.approx(exact(values), rel=1e-4)
    probed = spread_on_complements(problem)
    assert probed == pytest.approx(exact(1 / values), rel=PROBED)


def test_directions_of_the_model_do_not_count() -> None:
    problem = problem_of(STRONG)
    values = torch.linalg.eigvalsh(unit_gram(problem)).flip(0)
    found = spread_on_supports(problem, RANK)
    assert found == pytest.approx(exact(values[RANK:]), rel=1e-2)
    assert found < spread_on_supports(problem, 0) / 1.2
    assert spread_on_supports(problem, WIDTH) >= 1


def test_spreads_are_shared_by_all_rows() -> None:
    problem = problem_of(BROAD)
    assert spread_on_supports(problem, 1) is spread_on_supports(problem, 1)
    factor = problem.factor(torch.float64)
    assert factor.unit_inverse is factor.unit_inverse
    other = problem.with_damping(1.0)
    assert spread_on_complements(other) < spread_on_complements(problem)
    assert spread_on_supports(other, 1) < spread_on_supports(problem, 1)


@pytest.mark.parametrize(("eigenvalues", "better"), [(STRONG, 1), (WEAK, 0)])
def test_half_of_the_weights_go_where_fewer_iterations_are(
    eigenvalues: Tensor, better: int
) -> None:
    problem = problem_of(eigenvalues)
    sides: tuple[Any, ...] = ("support", "complement", "auto")
    taken = [
        lw.solve(problem, LeastSquares(method="cg", rank=0, side=side)).iterations
        for side in sides
    ]
    assert taken[better] < taken[1 - better] / 1.2
    assert taken[2] == taken[better]

"""Factorizations: the ladder of damping, solves against the factor, eigenvalue bounds."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import InvalidProblemError, SolveError
from layerwise.linalg import (
    FIRST_DAMPING,
    damped,
    factorize,
    largest_eigenvalue,
    smallest_eigenvalue,
)
from layerwise.moments import Moments
from layerwise.patterns import Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Solution
from tests.support.problems import PROBLEMS, make_layer
from tests.support.tolerances import CLOSED_FORM, POWER_ITERATION


def gram_of(name: str) -> Moments:
    seen = PROBLEMS[name].seen.double()
    return Moments(seen @ seen.T / seen.shape[1])


def with_condition(condition: float, width: int = 16) -> Moments:
    basis = torch.linalg.qr(make_layer(7, width, width).weight)[0]
    values = condition ** -torch.linspace(0, 1, width, dtype=torch.float64)
    gram = (basis * values) @ basis.T
    return Moments((gram + gram.T) / 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damping", [0.01, 1.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_factor_is_that_of_the_damped_gram(
    name: str, damping: float, dtype: torch.dtype
) -> None:
    moments = gram_of(name)
    factor = moments.factor(damping, dtype)
    identity = torch.eye(moments.width, dtype=torch.float64)
    expected = moments.gram + damping * moments.mean_diagonal * identity
    lower = factor.lower.double()
    limit = CLOSED_FORM[dtype] * float(expected.abs().max())
    torch.testing.assert_close(lower @ lower.T, expected, rtol=0, atol=limit)
    assert not lower.triu(1).any()
    assert factor.damping == factor.requested == damping
    assert not factor.raised
    copy = damped(moments.gram, moments.mean_diagonal, damping, torch.float64)
    torch.testing.assert_close(copy, expected)
    assert moments.mean_diagonal == float(moments.gram.diagonal().mean())  # gram is intact


def test_solves_with_a_factor() -> None:
    moments = gram_of("correlated")
    factor = moments.factor(0.01, torch.float64)
    gram = damped(moments.gram, moments.mean_diagonal, 0.01, torch.float64)
    inverse = torch.linalg.inv(gram)
    rows = PROBLEMS["correlated"].weight
    limit = CLOSED_FORM[torch.float64]
    for found, expected in (
        (factor.solve_rows(rows), rows @ inverse),
        (factor.inverse_diagonal(), inverse.diagonal()),
        (factor.inverse_norms(rows), ((rows @ inverse) * rows).sum(dim=1)),
    ):
        slack = limit * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=slack)
    assert factor.solve_rows(rows.float()).dtype == torch.float32


def test_float32_gives_way_to_float64_at_the_same_damping() -> None:
    moments = with_condition(1e10)
    factor = moments.factor(0.0, torch.float32)
    assert factor.lower.dtype == torch.float64
    assert factor.damping == 0
    assert not factor.raised
    easy = with_condition(1e2).factor(0.0, torch.float32)
    assert easy.lower.dtype == torch.float32


def test_singular_gram_climbs_the_ladder() -> None:
    for name in ("dead-channel", "duplicate-channel", "few-tokens"):
        factor = gram_of(name).factor(0.0, torch.float64)
        assert factor.raised
        assert (factor.requested, factor.damping) == (0.0, FIRST_DAMPING)
        assert torch.isfinite(factor.lower).all()


def test_each_rung_is_ten_times_the_one_before() -> None:
    # smallest eigenvalue -0.03 of a gram with mean diagonal 1
    gram = torch.eye(4, dtype=torch.float64)
    gram[0, 1] = gram[1, 0] = 0.0
    gram[0, 0], gram[1, 1] = -0.03, 2.03
    factor = factorize(gram, 1.0, 1e-3, torch.float32)
    assert factor.damping == pytest.approx(0.1)
    assert factor.requested == 1e-3


def test_indefinite_gram_is_an_error() -> None:
    cycle = torch.eye(3, dtype=torch.float64)  # pairwise possible, together not
    for row, column, value in ((0, 1, 1.0), (1, 2, 1.0), (0, 2, -1.0)):
        cycle[row, column] = cycle[column, row] = value
    assert float(torch.linalg.eigvalsh(cycle)[0]) == pytest.approx(-1)
    with pytest.raises(SolveError, match=r"indefinite.*fails even at damping 1; check"):
        Moments(cycle).factor(0.01, torch.float32)


def test_negative_damping_is_an_error() -> None:
    with pytest.raises(InvalidProblemError, match=r"must not be negative, got -0\.1"):
        gram_of("plain").factor(-0.1, torch.float64)


def eigenvalues(matrix: Tensor) -> tuple[float, float]:
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])


@pytest.mark.parametrize("name", PROBLEMS)
def test_eigenvalues_are_bounded_from_inside(name: str) -> None:
    moments = gram_of(name)
    gram = damped(moments.gram, moments.mean_diagonal, 0.01, torch.float64)
    factor = moments.factor(0.01, torch.float64)
    for scaling in (torch.ones_like(gram[0]), gram.diagonal().rsqrt()):
        least, largest = eigenvalues(gram * scaling * scaling[:, None])
        above = largest_eigenvalue(gram * scaling * scaling[:, None])
        below = smallest_eigenvalue(factor, scaling)
        rounding = 1 + CLOSED_FORM[torch.float64]
        assert largest * (1 - POWER_ITERATION) <= above <= largest * rounding
        assert least / rounding <= below <= least * (1 + POWER_ITERATION)


BACKENDS: Any = torch.backends
MATMULS = (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul)


def precisions() -> list[str]:
    """Of float32 products, by both interfaces of PyTorch."""
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = "refused"
    return [older, *(place.fp32_precision for place in MATMULS)]


@pytest.fixture
def _default_precision() -> Iterator[None]:
    yield
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for place in MATMULS:
        place.fp32_precision = "none"


def older(precision: str) -> None:
    torch.set_float32_matmul_precision(precision)


def newer(place: Any, precision: str) -> None:
    place.fp32_precision = precision


@pytest.mark.usefixtures("_default_precision")
@pytest.mark.parametrize(
    ("allow", "argument"),
    [
        *((older, precision) for precision in ("highest", "high", "medium")),
        *((partial(newer, place), "tf32") for place in (BACKENDS, MATMULS[0])),
        (partial(newer, MATMULS[1]), "bf16"),
    ],
)
def test_float32_products_are_float32_inside(
    allow: Callable[[str], None], argument: str
) -> None:
    """Whatever the program has allowed, by either interface, and it keeps that."""
    allow(argument)
    before, seen = precisions(), []

    class Watching:
        def solve(self, problem: LayerProblem) -> Solution:
            seen.extend(precisions())
            return lw.solve(problem, "wanda")

    lw.solve(PROBLEMS["plain"].problem(Unstructured(0.5)), Watching())
    assert seen[0] == "highest"
    assert set(seen[1:]) <= {"ieee", "none"}
    assert precisions() == before

"""Splits of a gram, which stay proven while Newton steps improve them, and relaxations."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.lower_bounds import lower_bounds
from layerwise.patterns import Unstructured
from layerwise.perspective import relax, shared_inverse
from layerwise.splits import (
    BARRIER,
    _Barrier,
    proven_split,
    remainder,
    smallest_share,
    weighted_split,
)
from tests.benchmarks.optimality import SPECTRA
from tests.support.problems import Layer, make_layer
from tests.support.tolerances import PERSPECTIVE, RELAXED

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
BLOCK_DIAGONAL: Any = torch.block_diag  # which has no types


def is_semidefinite(gram: Tensor, split: Tensor) -> bool:
    """Whether ``H - D`` is, in exact arithmetic, by elimination."""
    parts = BLOCK_DIAGONAL(*split).tolist()
    rows = [
        [Fraction(whole) - Fraction(part) for whole, part in zip(*pair, strict=True)]
        for pair in zip(gram.tolist(), parts, strict=True)
    ]
    for step in range(len(rows)):
        pivot = rows[step][step]
        if pivot < 0 or (pivot == 0 and any(rows[step][step + 1 :])):
            return False
        for below in range(step + 1, len(rows)):
            factor = rows[below][step] / pivot if pivot else Fraction(0)
            for column in range(step, len(rows)):
                rows[below][column] -= factor * rows[step][column]
    return True


@pytest.mark.parametrize("size", [1, 4])
def test_remainders_are_semidefinite_in_exact_arithmetic(size: int) -> None:
    """Splits that touch the boundary up to rounding, of grams next to singular ones."""
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        tall = torch.randn(8, 7, generator=generator, dtype=torch.float64)
        for ridge in (1e-12, 1e-8, 1e-2):
            gram = tall @ tall.T / 8 + ridge * torch.eye(8, dtype=torch.float64)
            gram = (gram + gram.T) / 2
            touching = smallest_share(gram, size)
            split = proven_split(gram, touching)
            assert split is not None
            assert is_semidefinite(gram, split)


def test_splits_that_go_too_far_are_shrunk() -> None:
    gram = SPECTRA["power-law 1"](torch.Generator().manual_seed(1), 12)
    share = smallest_share(gram, 1)
    found = proven_split(gram, 50 * share)
    assert found is not None
    assert bool((torch.linalg.eigvalsh(remainder(gram, found)) > 0).all())
    assert proven_split(0 * gram, share) is None


def barrier_of(spectrum: str) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Gram, start, importance and the barrier problem, written down again."""
    gram = SPECTRA[spectrum](torch.Generator().manual_seed(2), 12)
    gram /= gram.diagonal().mean()
    importance = 1 + torch.rand(12, generator=torch.Generator().manual_seed(3)).double()
    start = 0.98 * smallest_share(gram, 1)[:, 0, 0]
    nu = BARRIER * float(importance @ start) / 12

    def value(diagonal: Tensor) -> Tensor:
        return importance @ diagonal + nu * torch.logdet(gram - diagonal.diag())

    return gram, start, importance, value


@every_spectrum
def test_newton_steps_raise_the_barrier_problem(spectrum: str) -> None:
    gram, start, importance, value = barrier_of(spectrum)
    found = weighted_split(gram, start, importance)
    assert value(found) > value(start)
    assert bool((found > 0).all())
    assert bool((torch.linalg.eigvalsh(gram - found.diag()) > 0).all())


@every_spectrum
def test_newton_steps_are_those_of_the_barrier_problem(spectrum: str) -> None:
    gram, start, importance, value = barrier_of(spectrum)
    point = (0.5 * start).requires_grad_()
    (slope,) = torch.autograd.grad(value(point), point, create_graph=True)
    rows = [torch.autograd.grad(s, point, retain_graph=True)[0] for s in slope]
    hessian, slope = torch.stack(rows), slope.detach()
    barrier = _Barrier(gram, importance, BARRIER * (importance @ start) / 12)
    here = barrier.of(point.detach())
    step, length = barrier.step(here)
    torch.testing.assert_close(here.value, value(point.detach()))
    torch.testing.assert_close(step, -torch.linalg.solve(hessian, slope))
    torch.testing.assert_close(length**2 * barrier._nu, slope @ step)


def test_many_newton_steps_find_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.splits.NEWTON_STEPS", 50)
    gram, start, importance, value = barrier_of("power-law 1")
    found = weighted_split(gram, start, importance).requires_grad_()
    (slope,) = torch.autograd.grad(value(found), found)
    assert float(slope.abs().max()) < 1e-6


def test_a_split_stays_where_no_step_is_better() -> None:
    gram = torch.eye(3, dtype=torch.float64)
    outside = torch.full((3,), 2.0, dtype=torch.float64)  # nothing is left of the gram
    assert torch.equal(weighted_split(gram, outside, outside), outside)


def test_relaxation_finds_the_best_direction() -> None:
    """Against CVXPY: the perspective relaxation is a second-order cone program."""
    cvxpy = pytest.importorskip("cvxpy")
    gram = SPECTRA["power-law 1"](torch.Generator().manual_seed(6), 10)
    root = (0.98 * smallest_share(gram, 1)[:, 0, 0]).sqrt()
    left = remainder(gram, root.square()[:, None, None]) / root / root[:, None]
    weight = torch.randn(3, 10, generator=torch.Generator().manual_seed(7)).double()
    pattern = Unstructured(0.5)
    start = torch.where(pattern.mask(weight.abs()), weight, 0)
    direction = relax(shared_inverse(left), weight, start, pattern).direction
    image = direction @ left
    gains = (weight - image).square()
    lost = torch.where(pattern.mask(gains), 0, gains).sum(dim=1)
    found = lost - (image * (image + direction)).sum(dim=1)
    lower = torch.linalg.cholesky(left).T.numpy()
    for row in range(3):
        w = weight[row].numpy()
        v, z, t = (cvxpy.Variable(10) for _ in range(3))
        cones = [cvxpy.quad_over_lin(v[j], z[j]) <= t[j] for j in range(10)]
        cost = cvxpy.sum_squares(lower @ (v - w)) + cvxpy.sum(t) - 2 * w @ v + w @ w
        model = cvxpy.Problem(
            cvxpy.Minimize(cost), [*cones, z >= 0, z <= 1, cvxpy.sum(z) <= 5]
        )
        model.solve(solver=cvxpy.CLARABEL)
        upper = model.value * (1 + PERSPECTIVE)
        assert RELAXED * model.value <= float(found[row]) <= upper


def test_shape_of_a_layer_is_no_shape_of_a_row() -> None:
    layer = Layer(make_layer(74, rows=5, width=7).weight, make_layer(74, 5, 7).inputs)
    for pattern in (Unstructured(0.3), Unstructured(0.3, "layer")):
        assert bool(torch.isfinite(lower_bounds(layer.problem(pattern))).all())

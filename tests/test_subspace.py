"""Low-rank factors: orthonormal, as good as they claim, and of the smallest rank."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from layerwise.errors import UsageError
from layerwise.solvers.optimizer.second_moment import RankRule, growth, select, update
from layerwise.solvers.optimizer.subspace import (
    by_singular_value,
    error_rate,
    error_rates,
    subspace_iteration,
)
from tests.support.tolerances import FACTORS, NEAR_BEST, ROUNDING, WARM_START

DTYPES = (torch.float32, torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=dtype)


def positive(*shape: int, seed: int = 2) -> Tensor:
    """Squares with row and column scales of several decades, as second moments have."""
    rows, columns = normal(*shape[:-1], 1), normal(1, shape[-1], seed=1)
    squares = (normal(*shape, seed=seed) * (rows + columns).exp()).square()
    return 1e-6 * squares


def residual(A: Tensor, Q: Tensor, U: Tensor) -> Tensor:
    rate: Tensor = (A - Q @ U.mT).norm(dim=(-2, -1)) / A.norm(dim=(-2, -1))
    return rate


def best_rate(A: Tensor, rank: int) -> Tensor:
    values = torch.linalg.svdvals(A).square()
    rate: Tensor = (values[..., rank:].sum(dim=-1) / values.sum(dim=-1)).sqrt()
    return rate


def draw(member: int, present: int, width: int, columns: int = 40) -> Tensor:
    generator = Generator().manual_seed(1000 * member + 50 * present + width)
    return torch.randn(columns, width - present, generator=generator)


def rule(**changes: float) -> RankRule:
    options = {"smallest": 1, "largest": 10, "threshold": 0.05, "oversampling": 5}
    return RankRule(**{**options, "iterations": 5, "warm_start": True, **changes})  # type: ignore[arg-type]


# --- subspace iteration ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rank_one_is_recovered(dtype: torch.dtype) -> None:
    A = normal(30, 1, dtype=dtype) @ normal(1, 20, seed=1, dtype=dtype)
    Q, U = subspace_iteration(A, 1, generator=Generator().manual_seed(0))
    assert residual(A, Q, U) < FACTORS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_basis_is_orthonormal_and_close_to_the_best(
    dtype: torch.dtype, scale: float
) -> None:
    A = scale * positive(3, 60, 40).to(dtype)
    Q, U = by_singular_value(
        *subspace_iteration(A, 12, oversampling=0, generator=Generator().manual_seed(0))
    )
    assert Q.shape == (3, 60, 12)
    assert U.shape == (3, 40, 12)
    assert (Q.mT @ Q - torch.eye(12)).abs().max() < FACTORS[dtype]
    best = best_rate(A.double() / scale, 6)
    assert (error_rates(A, U)[:, 5] < (1 + NEAR_BEST) * best).all()


def test_product_of_factors_can_be_negative() -> None:
    A = positive(60, 40)
    Q, U = subspace_iteration(A, 6, generator=Generator().manual_seed(0))
    assert (Q @ U.mT < 0).any()


def test_error_rate_is_the_explicit_residual() -> None:
    A = positive(3, 30, 20)
    Q, U = subspace_iteration(A, 5, generator=Generator().manual_seed(0))
    rates = error_rates(A, U)
    for k in range(1, 6):
        explicit = residual(A, Q[..., :k], U[..., :k])
        assert (rates[:, k - 1] - explicit).abs().max() < ROUNDING
    assert torch.equal(error_rate(A, U), rates[:, -1])


def test_more_columns_of_one_basis_never_hurt() -> None:
    A = positive(30, 20)
    _, U = subspace_iteration(A, 20, generator=Generator().manual_seed(0))
    rates = error_rates(A, U)
    assert (rates.diff() <= 0).all()
    assert rates[-1] < ROUNDING**0.5  # the whole space: 1 - 1 under the root


def test_rotation_keeps_the_product_and_truncates_best() -> None:
    A = positive(30, 20)
    Q, U = subspace_iteration(A, 8, generator=Generator().manual_seed(0))
    turned, ordered = by_singular_value(Q, U)
    assert torch.allclose(turned @ ordered.mT, Q @ U.mT, rtol=0, atol=ROUNDING)
    values = torch.linalg.svdvals(Q @ U.mT)[:8]
    assert torch.allclose(ordered.norm(dim=0), values, atol=ROUNDING)
    assert (error_rates(A, ordered) <= error_rates(A, U) + ROUNDING).all()
    assert error_rates(A, ordered)[0] < error_rates(A, U)[0]


def test_zero_matrix_has_no_error() -> None:
    A = torch.zeros(6, 4)
    Q, U = by_singular_value(*subspace_iteration(A, 2))
    assert error_rates(A, U).tolist() == [0, 0]
    assert (Q.mT @ Q - torch.eye(2)).abs().max() < FACTORS[torch.float32]
    assert not U.any()


def test_start_is_used_and_missing_columns_are_drawn() -> None:
    A = positive(30, 20)
    right = torch.linalg.svd(A).Vh[:4].T
    _, U = subspace_iteration(A, 4, oversampling=0, iterations=1, start=right)
    assert (error_rate(A, U) - best_rate(A, 4)).abs() < ROUNDING
    _, U = subspace_iteration(A, 6, iterations=1, start=right[:, :2])
    assert U.shape == (20, 6)
    assert error_rate(A, U) < error_rate(A, subspace_iteration(A, 2, start=right[:, :2])[1])


@pytest.mark.parametrize(
    ("rank", "options"),
    [(0, {}), (5, {}), (1, {"oversampling": -1}), (1, {"iterations": 0})],
)
def test_impossible_arguments_are_refused(rank: int, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must"):
        subspace_iteration(torch.ones(6, 4), rank, **options)


# --- selection of ranks ------------------------------------------------------------------


def sequence(steps: int) -> list[Tensor]:
    """Moments (2, 30, 40) that drift: a running mean of squares."""
    V, found = positive(2, 30, 40), []
    for step in range(steps):
        V = 0.99 * V + 0.01 * positive(2, 30, 40, seed=10 + step)
        found.append(V)
    return found


def test_warm_start_is_as_good_as_five_iterations() -> None:
    first, *later = sequence(20)
    Q = torch.stack([left for left, _ in select(first, None, rule(threshold=0), draw)])
    cold = rule(warm_start=False)
    warm_rates, cold_rates = [], []
    for V in later:
        Q, U = update(V, Q, rule(), draw)
        warm_rates.append(error_rate(V, U))
        cold_rates.append(error_rate(V, update(V, Q, cold, draw)[1]))
    ratio = torch.stack(warm_rates).mean() / torch.stack(cold_rates).mean()
    assert ratio < 1 + WARM_START


@pytest.mark.parametrize("warm_start", [True, False])
def test_selected_rank_is_accurate_enough(warm_start: bool) -> None:
    V = positive(2, 30, 40)
    few = normal(30, 3).abs() @ normal(3, 40, seed=1).abs()
    V = torch.stack([V[0], few, torch.zeros(30, 40, dtype=V.dtype)])
    found = select(V, None, rule(warm_start=warm_start, threshold=0.1), draw)
    rates = [float(error_rate(V[i], U)) for i, (_, U) in enumerate(found)]
    ranks = [U.shape[1] for _, U in found]
    assert ranks[2] == 1
    assert rates[1] <= 0.1
    assert rates[0] <= 0.1 or ranks[0] == 10
    if warm_start:  # and no larger than needed
        assert (
            ranks[1]
            == int(
                (torch.tensor([float(best_rate(few, k)) for k in range(1, 4)]) > 0.1).sum()
            )
            + 1
        )


def test_rank_shrinks_and_grows() -> None:
    few = normal(1, 30, 2).abs() @ normal(1, 2, 40, seed=1).abs()
    many = positive(1, 30, 40)
    exact = rule(threshold=1e-4)
    ((Q, U),) = select(many, None, exact, draw)
    assert U.shape == (40, 10)
    ((Q, U),) = select(few, Q[None], exact, draw)
    assert U.shape == (40, 2)
    assert Q.shape == (30, 2)
    ((Q, U),) = select(many, Q[None], exact, draw)
    assert U.shape == (40, 10)


def test_factors_own_no_dropped_columns() -> None:
    few = normal(2, 30, 2).abs() @ normal(2, 2, 40, seed=1).abs()
    for side in (
        side for pair in select(few, None, rule(threshold=1e-4), draw) for side in pair
    ):
        assert side.untyped_storage().nbytes() == side.numel() * side.element_size()


def test_published_growth() -> None:
    assert [growth(rate) for rate in (0.0, 0.01, 0.25, 1.0)] == [7, 8, 91, 191]

"""Adapprox: equal to its definition, and a drop-in for AdamW."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import SolveError
from layerwise.solvers.adapprox import MAX_GUIDANCE, Adapprox
from layerwise.solvers.optimizer import directions as adapprox_directions
from tests.support.optimizer import SHAPES, VARIANTS, parameters, run, set_gradients
from tests.support.tolerances import FULL_RANK

# --- the update --------------------------------------------------------------------------


@pytest.mark.parametrize("warm_start", [True, False])
def test_full_rank_is_adam_without_bias_correction(warm_start: bool) -> None:
    """Written out with dense moments; clipping is active in the first steps."""
    lr, beta1, beta2, eps, decay, clip = 0.01, 0.9, 0.99, 1e-8, 0.1, 0.8
    (p,) = parameters([(6, 9)], torch.float64)
    weight = p.detach().clone()
    V, M = torch.zeros_like(weight), torch.zeros_like(weight)
    optimizer = Adapprox(
        [p],
        lr,
        (beta1, beta2),
        eps,
        decay,
        clip=clip,
        max_rank=1.0,
        initial_rank=6,
        warm_start=warm_start,
    )
    clipped = 0
    for step in range(30):
        set_gradients([p], step)
        assert p.grad is not None
        G = p.grad.clone()
        optimizer.step()
        V = beta2 * V + (1 - beta2) * G**2
        N = G / (V**0.5 + eps)
        rms = float((N**2).mean() ** 0.5)
        clipped += rms > clip
        N /= max(1.0, rms / clip)
        M = beta1 * M + (1 - beta1) * N
        weight -= lr * (M + decay * weight)
        assert torch.allclose(p.detach(), weight, rtol=0, atol=FULL_RANK)
    assert clipped > 0
    assert optimizer.ranks() == [6]


def test_vectors_and_matrices_follow_the_same_rule() -> None:
    """A dense second moment and factors of full rank give equal weights."""
    (dense,) = parameters([(6, 9)], torch.float64)
    factored = nn.Parameter(dense.detach().clone())
    run(Adapprox([dense], max_rank=0.0), range(20))
    run(Adapprox([factored], max_rank=1.0, initial_rank=6), range(20))
    assert torch.allclose(dense, factored, rtol=0, atol=FULL_RANK)


@pytest.mark.parametrize("variant", VARIANTS)
def test_directions_are_clipped_and_bounded(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []
    original = adapprox_directions.directions

    def recorded(group: Any, batch: Any) -> list[Tensor]:
        result = original(group, batch)
        gradients = [entry.precise_gradient() for entry in batch]
        for N, G in zip(result, gradients, strict=True):
            assert N.shape == G.shape
            assert ((N == 0) | (N.sign() == G.sign())).all()
        found.extend(result)
        return result

    monkeypatch.setattr("layerwise.solvers.adapprox.directions", recorded)
    options = {**variant, "clip": 0.5}
    run(Adapprox(parameters(), **options), range(25))
    assert len(found) == 25 * len(SHAPES)
    for N in found:
        assert N.square().mean().sqrt() <= 0.5 * (1 + 1e-6)


def test_second_moment_is_at_least_the_newest_square() -> None:
    """Negative entries of Q U^T are clamped: no direction is above 1 / sqrt(1 - beta2)."""
    (p,) = parameters([(24, 40)])
    optimizer = Adapprox([p], 1.0, (0.0, 0.9), 0.0, 0.0, clip=math.inf, max_rank=0.1)
    negative = 0
    for step in range(20):
        set_gradients([p], step)
        before = p.detach().clone()
        optimizer.step()
        state = optimizer.state[p]
        negative += int((state["left"] @ state["right"].T < 0).sum())
        assert p.isfinite().all()
        assert (before - p.detach()).abs().max() <= 1.0001 / 0.1**0.5
    assert negative > 0


def test_cosine_guidance_follows_its_formula_and_is_capped() -> None:
    (p,) = parameters([(5,)], torch.float64)
    optimizer = Adapprox([p], 1.0, weight_decay=0, cosine_guidance=True)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    optimizer.step()  # the first M is parallel to N
    assert torch.allclose(before - p.detach(), MAX_GUIDANCE * 0.1 * torch.ones_like(p))
    p.grad = torch.tensor([1.0, -1.0, 3.0, 0.5, -2.0], dtype=torch.float64)
    M = optimizer.state[p]["exp_avg"].clone()
    V = optimizer.state[p]["exp_avg_sq"] * 0.999 + 0.001 * p.grad**2
    N = p.grad / (V.sqrt() + 1e-8)
    N /= N.square().mean().sqrt()
    M = 0.9 * M + 0.1 * N
    cosine = float(N @ M / (N.norm() * M.norm()))
    assert 0 < cosine < 0.9
    before = p.detach().clone()
    optimizer.step()
    assert torch.allclose(before - p.detach(), M / (1 - cosine + 1e-8))
    assert torch.allclose(optimizer.state[p]["exp_avg"], M)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = parameters(), parameters()
    run(Adapprox(together), range(25))
    monkeypatch.setattr(adapprox_directions, "CHUNK", 1)
    run(Adapprox(alone), range(25))
    for p, q in zip(together, alone, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-5)


def test_rank_follows_the_spectrum_of_the_gradient() -> None:
    given = parameters([(40, 48), (40, 48)])
    optimizer = Adapprox(given, betas=(0.9, 0.9), error_threshold=0.05)
    outer = torch.outer(torch.linspace(1, 2, 40), torch.linspace(1, 3, 48))
    seen = []
    for step in range(300):
        set_gradients(given, step)
        if not 40 <= step < 80:
            given[0].grad = outer.clone()
        optimizer.step()
        seen.append([rank or 0 for rank in optimizer.ranks()])
    assert {first for first, _ in seen[:40]} == {1}
    assert max(second for _, second in seen) == 10  # a quarter of the shorter side
    assert min(second for _, second in seen) > 2
    assert max(first for first, _ in seen[40:80]) == 10
    assert seen[-1][0] == 1


# --- a drop-in ---------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_minimises(variant: dict[str, Any]) -> None:
    given, target = parameters(), parameters()
    optimizer = Adapprox(given, **{**variant, "lr": 0.05, "weight_decay": 0.0})
    with torch.no_grad():
        for p in given:
            p.add_(1.0)

    def loss() -> Tensor:
        pairs = zip(given, target, strict=True)
        return torch.stack([(p - t.detach()).square().sum() for p, t in pairs]).sum()

    start = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss().item() < 0.05 * start


def test_groups_have_options_of_their_own() -> None:
    a, b, c = parameters([(24, 40), (24, 40), (24, 40)])
    start = [p.detach().clone() for p in (a, b, c)]
    optimizer = Adapprox([{"params": [a]}, {"params": [b], "lr": 0.0}], lr=0.01)
    run(optimizer, range(3))
    assert not torch.equal(a, start[0])
    assert torch.equal(b, start[1])
    optimizer.add_param_group({"params": [c], "betas": (0.0, 0.9), "max_rank": 0.0})
    run(optimizer, range(3, 6))
    assert not torch.equal(c, start[2])
    assert "exp_avg" not in optimizer.state[c]
    ranks = optimizer.ranks()
    assert None not in ranks[:2]
    assert ranks[2] is None


def test_scheduler_sets_the_learning_rate() -> None:
    (p,) = parameters([(24, 40)])
    optimizer = Adapprox([p], lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    run(optimizer, range(1))
    scheduler.step()
    before = p.detach().clone()
    run(optimizer, range(1, 3))
    assert torch.equal(p, before)


def test_weight_decay_is_decoupled() -> None:
    given = parameters([(24, 40), (7,)])
    start = [p.detach().clone() for p in given]
    optimizer = Adapprox(given, lr=0.1, weight_decay=0.5)
    for p in given:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, before in zip(given, start, strict=True):
        assert torch.allclose(p, 0.95 * before)


def test_parameters_without_gradient_stay() -> None:
    given = parameters([(24, 40), (7,), (0, 3)])
    optimizer = Adapprox(given)
    run(optimizer, range(1))
    optimizer.zero_grad(set_to_none=True)
    before = [p.detach().clone() for p in given]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(given, before, strict=True))
    assert optimizer.state[given[0]]["step"] == 1


def test_closure_is_called_with_gradients() -> None:
    (p,) = parameters([(24, 40)])
    optimizer = Adapprox([p])

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert first is not None
    assert second is not None
    assert second < first


def test_gradients_are_left_alone() -> None:
    given = parameters()
    optimizer = Adapprox(given)
    set_gradients(given, 0)
    before = [p.grad.clone() for p in given if p.grad is not None]
    optimizer.step()
    for p, gradient in zip(given, before, strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, gradient)


# --- refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("where", [0, 3])
def test_gradient_that_is_not_finite_changes_nothing(bad: float, where: int) -> None:
    given = parameters()
    optimizer = Adapprox(given)
    run(optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in given]
    set_gradients(given, 2)
    gradient = given[where].grad
    assert gradient is not None
    gradient.view(-1)[3] = bad
    with pytest.raises(SolveError, match=f"gradient of parameter {where}, "):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(given, weights, strict=True))
    assert optimizer.state_dict()["state"][where]["step"] == before["state"][where]["step"]


def test_check_of_gradients_can_be_off() -> None:
    (p,) = parameters([(7,)])
    optimizer = Adapprox([p], check_finite=False)
    p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert p.isnan().all()


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"betas": (1.0, 0.9)},
        {"betas": (0.9, -0.1)},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"clip": 0.0},
        {"max_rank": 1.5},
        {"initial_rank": 0},
        {"error_threshold": -0.1},
        {"select_every": 0},
        {"oversampling": -1},
        {"iterations": 0},
        {"betas": (0.0, 0.9), "cosine_guidance": True},
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    name = list(options)[-1]
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        Adapprox(parameters(), **options)
    optimizer = Adapprox(parameters())
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        optimizer.add_param_group({"params": parameters([(3, 3)]), **options})
    assert len(optimizer.param_groups) == 1


def test_complex_parameters_are_refused() -> None:
    optimizer = Adapprox(parameters())
    with pytest.raises(ValueError, match="real parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, 4) + 0j)]})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        Adapprox(embedding.parameters()).step()

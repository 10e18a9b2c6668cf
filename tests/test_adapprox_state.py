"""The state of Adapprox: stored and loaded, its seed, its memory, its precision."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.solvers.adapprox import PUBLISHED, Adapprox
from layerwise.solvers.optimizer.memory import state_bytes
from tests.support.optimizer import VARIANTS, parameters, run, set_gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_state_goes_on_bit_by_bit(
    variant: dict[str, Any], dtype: torch.dtype
) -> None:
    ours = parameters(dtype=dtype)
    optimizer = Adapprox(ours, **variant)
    run(optimizer, range(13))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copies = [nn.Parameter(p.detach().clone()) for p in ours]
    loaded = Adapprox(copies, lr=1.0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, range(13, 35))
    run(loaded, range(13, 35))
    assert loaded.ranks() == optimizer.ranks()
    for p, q in zip(ours, copies, strict=True):
        assert torch.equal(p, q)


def test_loaded_state_shares_nothing() -> None:
    ours, other = parameters(), parameters()
    optimizer, loaded = Adapprox(ours), Adapprox(other)
    run(optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    run(loaded, range(3, 6))
    now = optimizer.state_dict()
    for key, state in saved["state"].items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(now["state"][key][name], value)


def test_seed_decides_the_random_columns() -> None:
    results: list[Tensor] = []
    for seed in (0, 0, 1):
        (p,) = parameters([(24, 40)])
        optimizer = Adapprox([p], seed=seed, **PUBLISHED)
        torch.manual_seed(len(results))  # the global generator must not matter
        run(optimizer, range(3))
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_the_factors(dtype: torch.dtype) -> None:
    given = parameters(dtype=dtype)
    optimizer = Adapprox(given)
    run(optimizer, range(12))
    # three matrices of 24 x 40 and one of 8 x 32 with factors, 7 + 18 + 1 numbers dense
    ranks = optimizer.ranks()
    assert ranks[3:5] == [None, None]
    assert ranks[6] is None
    numbers = sum(rank * (24 + 40) for rank in ranks[:3] if rank)
    numbers += (ranks[5] or 0) * (8 + 32) + 7 + 18 + 1
    assert optimizer.memory().second_moment == 4 * numbers
    assert optimizer.memory().first_moment == 4 * sum(p.numel() for p in given)
    assert optimizer.memory().total == 4 * (numbers + sum(p.numel() for p in given))


def test_no_first_moment_is_no_memory() -> None:
    optimizer = Adapprox(parameters(), betas=(0.0, 0.999))
    run(optimizer, range(2))
    assert optimizer.memory().first_moment == 0
    assert optimizer.memory().total == optimizer.memory().second_moment > 0


def test_memory_of_torch_optimizers() -> None:
    given = parameters()
    optimizer = torch.optim.AdamW(given)
    set_gradients(given, 0)
    optimizer.step()
    size = 4 * sum(p.numel() for p in given)
    measured = state_bytes(optimizer)
    assert (measured.first_moment, measured.second_moment) == (size, size)
    assert measured.total == 2 * size + 4 * len(given)  # a counter each


def test_bfloat16_keeps_its_state_in_float32() -> None:
    exact, rounded = parameters([(24, 40), (7,)]), parameters([(24, 40), (7,)])
    low = [nn.Parameter(p.detach().bfloat16()) for p in rounded]
    first, second = Adapprox(exact, lr=0.01), Adapprox(low, lr=0.01)
    once: dict[nn.Parameter, Tensor] = {}
    for step in range(20):
        set_gradients(low, step)
        for p, q in zip(exact, low, strict=True):
            assert q.grad is not None
            p.grad = q.grad.float()
        first.step()
        once = {q: q.detach().float() * (1 - 0.01 * 0.01) for q in low}
        second.step()
        for q in low:  # the step is rounded once
            once[q] -= 0.01 * second.state[q]["exp_avg"]
    for p, q in zip(exact, low, strict=True):
        assert q.dtype == torch.bfloat16
        states = [value for value in second.state[q].values() if isinstance(value, Tensor)]
        assert {value.dtype for value in states} == {torch.float32}
        assert torch.equal(first.state[p]["exp_avg"], second.state[q]["exp_avg"])
        assert torch.equal(q, once[q].bfloat16())

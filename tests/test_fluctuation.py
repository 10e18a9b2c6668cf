"""The published statistic of FLAP, token by token, and from an accumulator in chunks."""

import pytest
import torch
from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.fluctuation import RunningFluctuation


def token_by_token(sequences: Tensor) -> Tensor:
    """The definition, written as loops."""
    total = torch.zeros(sequences.shape[2], dtype=torch.float64)
    for k in range(2, len(sequences) + 1):
        mean = sequences[:k].mean(dim=(0, 1))
        for token in sequences[k - 1]:
            total += (token - mean) ** 2
    return total / len(sequences)


@pytest.fixture
def sequences() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 1, 5, dtype=torch.float64)
    noise = torch.randn(6, 7, 5, dtype=torch.float64, generator=generator)
    return 3 + spread * noise


def test_it_is_the_definition_however_it_is_cut(sequences: Tensor) -> None:
    expected = token_by_token(sequences)
    for cuts in ([6], [1, 5], [2, 2, 2]):
        running = RunningFluctuation(5)
        for part in torch.split(sequences, cuts):
            running.update(part)
        torch.testing.assert_close(running.value(), expected)


def test_it_is_not_the_variance(sequences: Tensor) -> None:
    found = token_by_token(sequences)
    variance = sequences.reshape(-1, 5).var(dim=0, correction=0)
    assert not torch.allclose(found / found.sum(), variance / variance.sum(), rtol=0.01)
    assert float(token_by_token(sequences[:1]).sum()) == 0  # the first counts nothing


def test_accumulators_collect_it_of_what_the_pruned_model_sees(sequences: Tensor) -> None:
    pruned = sequences.flip(0) * 1.5
    for given, seen in (((sequences,), sequences), ((sequences, pruned), pruned)):
        accumulator = MomentAccumulator(5, fluctuation=True)
        for chunks in zip(*(torch.split(tensor, 2) for tensor in given), strict=True):
            accumulator.update(*chunks)
        found = accumulator.moments()
        torch.testing.assert_close(found.fluctuation, token_by_token(seen))
        scaled = found.scaled(4.0).fluctuation
        torch.testing.assert_close(scaled, 4 * token_by_token(seen))


def test_it_is_not_collected_unless_asked(sequences: Tensor) -> None:
    accumulator = MomentAccumulator(5)
    accumulator.update(sequences)
    assert accumulator.moments().fluctuation is None

"""The loop: schedule, order of the batches, choice of a learning rate, states."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import DataError, SolveError, UsageError
from layerwise.recovery.states import pack, unpack
from layerwise.recovery.training import State, Training, batch_at, split, train

OPTIMIZERS = ["adamw", "adapprox"]


class Line:
    """Fit a matrix by gradient steps; batches differ in their noise."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.wanted = torch.randn(6, 5, generator=generator)
        self.noise = torch.randn(4, 6, 5, generator=generator) * 0.1
        self.parameters = [nn.Parameter(torch.zeros(6, 5)), nn.Parameter(torch.zeros(5))]
        self.seen: list[int] = []

    def values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def set_values(self, values: list[Tensor] | None = None) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.zero_() if values is None else parameter.copy_(values[index])

    def loss(self, index: int) -> Tensor:
        self.seen.append(index)
        weight = self.parameters[0] + self.parameters[1]
        return (weight - self.wanted - self.noise[index]).square().mean()

    def judge(self) -> float:
        with torch.no_grad():
            weight = self.parameters[0] + self.parameters[1]
            return float((weight - self.wanted).square().mean())

    def train(self, training: Training, **options: Any) -> State:
        return train(self, self.loss, self.judge, range(3), training, **options)


def test_schedule_warms_up_and_falls_to_zero() -> None:
    training = Training(steps=40)
    rates = [training.rate_at(step, 2.0) for step in range(40)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert max(rates) == rates[4] == 2.0
    assert all(one > other for one, other in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.1
    assert Training(steps=1).rate_at(0, 2.0) == 2.0


def test_every_pass_sees_every_batch_in_an_order_of_its_own() -> None:
    batches = range(2, 7)
    order = [batch_at(step, batches, seed=3) for step in range(20)]
    passes = [order[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == list(batches) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert order != [batch_at(step, batches, seed=4) for step in range(20)]


def test_the_last_batches_are_held_out() -> None:
    assert split(2) == (range(1), range(1, 2))
    assert split(32) == (range(28), range(28, 32))
    with pytest.raises(UsageError, match="at least two batches"):
        split(1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_best_rate_is_kept(optimizer: Any) -> None:
    line = Line()
    start = line.judge()
    state = line.train(Training(30, (1e-6, 0.1, 1e-5), optimizer))
    assert state.best_rate == 0.1
    assert line.judge() == state.best < 0.7 * start
    assert set(line.seen) == {0, 1, 2}


def test_what_is_worse_everywhere_is_undone() -> None:
    line = Line()
    line.wanted.zero_()  # the start is the optimum
    state = line.train(Training(5, (0.1, 1.0)))
    assert state.best_rate is None
    assert all(bool((parameter == 0).all()) for parameter in line.parameters)


def test_no_steps_change_nothing() -> None:
    line = Line()
    state = line.train(Training(0))
    assert state.best_rate is None
    assert line.seen == []


def test_a_rate_that_diverges_is_left_out_and_all_of_them_an_error() -> None:
    line = Line()
    found = line.train(Training(30, (1e30, 0.1)))
    assert found.best_rate == 0.1
    with pytest.raises(SolveError, match="not finite with any learning rate of 1e"):
        Line().train(Training(30, (1e30, 1e33)))
    broken = Line()
    broken.wanted.fill_(math.nan)
    with pytest.raises(SolveError, match="before any training"):
        broken.train(Training(3))


class Stop(Exception):
    """Ends a training after a state."""


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stop", range(1, 7))
def test_interrupted_training_ends_as_it_would_have(optimizer: Any, stop: int) -> None:
    """After every state on disk: in the middle of a rate and between two."""
    training = Training(12, (0.05, 0.1), optimizer, seed=1, save_every=4)
    whole = Line()
    expected = whole.train(training)
    stored: list[tuple[dict[str, Tensor], str]] = []

    def save(state: State) -> None:
        stored.append(pack(state))
        if len(stored) == stop:
            raise Stop

    with pytest.raises(Stop):
        Line().train(training, save=save)
    again = Line()
    found = again.train(training, state=unpack(*stored[-1]))
    assert found.losses == expected.losses
    assert found.best_rate == expected.best_rate
    for one, other in zip(again.parameters, whole.parameters, strict=True):
        assert torch.equal(one, other)


def test_damaged_states_are_refused() -> None:
    tensors, text = pack(State(best=1.0, now=[torch.ones(2)]))
    assert torch.equal(unpack(tensors, text).now[0], torch.ones(2))  # type: ignore[index]
    for given, broken in (
        ({}, text),
        (tensors, text[:-3]),
        (tensors, text.replace("best_rate", "rate")),
        (tensors, "[]"),
    ):
        with pytest.raises(DataError, match="damaged"):
            unpack(given, broken)


def test_impossible_settings() -> None:
    cases: list[dict[str, Any]] = [
        {"steps": -1},
        {"save_every": 0},
        {"learning_rates": ()},
        {"learning_rates": (0.0,)},
        {"learning_rates": (math.nan,)},
        {"optimizer": "sgd"},
    ]
    for options in cases:
        with pytest.raises(UsageError):
            Training(**options)

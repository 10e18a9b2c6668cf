"""Speed: what is counted is right, models take turns, and nothing is left behind."""

import itertools
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.errors import UnsupportedModelError, UsageError
from layerwise.reports.tables import print_speed
from layerwise.timing import speed
from layerwise.timing.speed import Speed, Timing, measure_speed
from tests.support.models import POSITIONS, VOCABULARY, tiny_model

SMALL: dict[str, Any] = {"batches": (1, 3), "length": 8, "new_tokens": 4, "repeats": 2}


@pytest.mark.parametrize("family", ["llama", "opt", "mamba"])
def test_figures_of_a_model(family: str) -> None:
    model = tiny_model(family).train()
    (found,) = measure_speed([model], **SMALL)
    assert model.training
    assert found.parameters == sum(p.numel() for p in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert found.bytes == sum(t.numel() * t.element_size() for t in tensors)
    assert found.peak_memory is None or found.peak_memory >= found.bytes
    assert {batch: t.tokens for batch, t in found.prefill.items()} == {1: 8, 3: 24}
    assert found.length == 8
    assert found.decode.tokens == 4
    for timing in (*found.prefill.values(), found.decode):
        assert len(timing.seconds) == 2
        assert min(timing.seconds) > 0


def test_shared_tensors_count_once() -> None:
    tied, loose = (tiny_model("llama", tied=tied) for tied in (True, False))
    of_tied, of_loose = measure_speed([tied, loose], **SMALL)
    embedding = tied.get_input_embeddings().weight
    assert of_loose.parameters - of_tied.parameters == embedding.numel()
    assert of_loose.bytes - of_tied.bytes == embedding.nbytes


def test_a_prompt_fits_the_model() -> None:
    (found,) = measure_speed([tiny_model("opt")], batches=(1,), repeats=1)
    assert found.length == POSITIONS
    assert found.decode.tokens == POSITIONS - 1


def test_end_tokens_and_other_settings_do_not_stop_the_decoding() -> None:
    """As of chat models: several end tokens, sampling, a length of their own."""
    model = tiny_model("llama")
    own = model.generation_config
    own.eos_token_id = list(range(VOCABULARY))
    own.do_sample, own.max_length, own.num_beams = True, 3, 2
    own.stop_strings = ["a"]
    (found,) = measure_speed([model], **SMALL)
    assert found.decode.tokens == SMALL["new_tokens"]
    assert model.generation_config is own


@pytest.mark.parametrize("positions", [2, 5])
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama"])
def test_short_contexts(family: str, positions: int) -> None:
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    more: dict[str, Any] = {name: positions}
    model = tiny_model(family, **more)
    (found,) = measure_speed([model], batches=(1, 2), repeats=1)
    assert found.length == positions
    assert found.decode.tokens == positions - 1


def test_no_position_is_left_to_decode() -> None:
    model = tiny_model("llama", max_position_embeddings=1)
    with pytest.raises(UsageError, match="has 1 positions: decoding needs 2"):
        measure_speed([model], **SMALL)


def test_a_model_that_stops_on_its_own_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "generate", lambda self, ids, **more: ids)
    with pytest.raises(UnsupportedModelError, match="gave 0 tokens, not 4"):
        measure_speed([model], **SMALL)


def test_models_take_turns_after_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    models = [nn.Linear(1, 1), nn.Linear(1, 1)]
    names = dict(zip(map(id, models), "ab", strict=True))
    turns = speed._turns(models, lambda model: order.append(names[id(model)]), 2)
    assert "".join(order) == "ababab"
    assert turns == [(1.0, 1.0), (1.0, 1.0)]


def test_medians_and_ratios() -> None:
    slow, fast = Timing(100, (4.0, 2.0, 9.0)), Timing(100, (2.0, 1.0, 1.0))
    assert slow.latency == 4.0
    assert slow.tokens_per_second == 25.0
    assert slow.speedup(fast) == 2.0  # of 2, 2 and 9


def test_peak_of_a_forward_pass_is_seen() -> None:
    """A pass that fills 64 MiB and lets go of them."""

    def work(_: nn.Module) -> None:
        torch.ones(1 << 24).sum()

    growth = speed._growth(nn.Linear(1, 1), work)
    if growth is None:
        pytest.skip("the kernel does not tell the peak of a process")
    assert 48 << 20 < growth < 128 << 20


def test_memory_is_not_guessed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the kernel does not report it, there is no figure and no line."""

    def refuse(self: Path, text: str) -> int:
        raise PermissionError(text)

    monkeypatch.setattr(Path, "write_text", refuse)
    (found,) = measure_speed([tiny_model("llama")], **SMALL)
    assert found.peak_memory is None
    print_speed(["a"], [found])
    assert "memory" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [{"batches": ()}, {"batches": (0,)}, {"length": 0}, {"repeats": 0}]
)
def test_impossible_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="must be at least 1, got 0"):
        measure_speed([tiny_model("llama")], **wrong)


def test_table_of_two_models(capsys: pytest.CaptureFixture[str]) -> None:
    one = Speed(2000, 8 << 20, 16 << 20, {1: Timing(8, (0.004,))}, 8, Timing(5, (0.5,)))
    two = Speed(1000, 4 << 20, 8 << 20, {1: Timing(8, (0.001,))}, 8, Timing(5, (0.2,)))
    print_speed(["dense", "pruned"], [one, two])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["dense", "pruned", "ratio"]
    assert rows[1] == ["parameters", "2,000", "1,000", "2.00x"]
    assert rows[2] == ["size", "8.0", "MiB", "4.0", "MiB", "2.00x"]
    assert rows[3] == ["peak", "memory", "16.0", "MiB", "8.0", "MiB", "2.00x"]
    assert rows[4] == ["prefill", "1", "x", "8", "4.00", "ms", "1.00", "ms", "4.00x"]
    assert rows[5] == ["2,000", "tokens/s", "8,000", "tokens/s"]
    assert rows[6] == ["decode", "10.0", "tokens/s", "25.0", "tokens/s", "2.50x"]
    print_speed(["dense"], [one])
    assert "ratio" not in capsys.readouterr().out


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    model = tiny_model("llama").cuda()
    (found,) = measure_speed([model], **SMALL)
    assert found.peak_memory is not None
    assert found.peak_memory > found.bytes

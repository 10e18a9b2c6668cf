"""Models without parameters: other threads do not notice that one is built."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MiniMaxConfig

from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.loading import quiet_transformers
from layerwise.run.models.opening import load_model
from layerwise.run.models.residency import Streamed
from layerwise.run.models.skeleton import read_config, skeleton_of
from tests.support.models import save_checkpoint, tiny_model

REGISTER = nn.Module.register_parameter


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    model = tiny_model("llama", dtype=torch.bfloat16)
    return Checkpoint.open(save_checkpoint(tmp_path / "m", model, tokenizer=False))


def test_other_threads_make_ordinary_modules_meanwhile(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []
    original = nn.ModuleList.__init__

    def spying(self: nn.ModuleList, *args: Any) -> None:
        """Every model has a list of blocks; another thread works while it is made."""
        original(self, *args)
        other = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        other.start()
        other.join()
        assert nn.Module.register_parameter is REGISTER

    monkeypatch.setattr(nn.ModuleList, "__init__", spying)
    assert Streamed.open(checkpoint) is not None
    assert made
    assert not any(p.is_meta for module in made for p in module.parameters())


def test_threads_that_open_folders_leave_nothing_behind(checkpoint: Checkpoint) -> None:
    threads = [threading.Thread(target=Streamed.open, args=(checkpoint,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert nn.Module.register_parameter is REGISTER
    assert nn.Linear(2, 2).weight.device == torch.zeros(1).device


def test_the_callers_random_numbers_and_type_are_left_alone(checkpoint: Checkpoint) -> None:
    state = torch.random.get_rng_state()
    Streamed.open(checkpoint)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_computed_buffers_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    """Decays of linear attention, computed in float32 whatever the type of the model."""
    config = MiniMaxConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    opened = Checkpoint.open(save_checkpoint(tmp_path / "m", model, tokenizer=False))
    built = skeleton_of(opened, read_config(opened), dtype=torch.bfloat16, buffers=True)
    assert all(parameter.is_meta for parameter in built.parameters())
    loaded: dict[str, Tensor] = dict(load_model(opened).named_buffers())
    for name, buffer in built.named_buffers():
        assert buffer.dtype == loaded[name].dtype, name
        assert torch.equal(buffer, loaded[name]), name


def test_threads_of_a_program_wait_for_each_other(checkpoint: Checkpoint) -> None:
    """Transformers sets the default type of all threads while it builds a model."""
    opened: list[Streamed | None] = []
    with quiet_transformers():
        other = threading.Thread(target=lambda: opened.append(Streamed.open(checkpoint)))
        other.start()
        other.join(0.2)
        assert not opened
    other.join()
    assert opened

"""Biases that a cut needs: where a format has a place for them, and where it has none."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layerwise.adapters import get_coupling
from layerwise.errors import UsageError
from layerwise.run.models.rewrite import add_bias
from layerwise.run.models.stock import holds_bias
from layerwise.run.models.surgery import shrink
from tests.support.cutting import (
    distance,
    evenly,
    logits_of,
    masked,
    model_of,
    names_of,
    random_cuts,
    size_of,
    state_of,
)
from tests.support.tolerances import SURGERY


@pytest.mark.parametrize(
    ("family", "name", "linear", "added"),
    [
        ("llama", "mlp", "mlp.down_proj", 7 + 7 + 16),
        ("llama", "heads", "self_attn.o_proj", 8 + 4 + 4 + 16),
        ("qwen3", "heads", "self_attn.o_proj", 8 + 4 + 4 + 16),
        ("mamba", "inner", "mixer.out_proj", 14 + 16),
        ("falcon_mamba", "inner", "mixer.out_proj", 14 + 16),
    ],
)
def test_biases_under_a_flag(
    family: str, name: str, linear: str, added: int, tmp_path: Path
) -> None:
    """One block gets a bias; the flag gives one to all blocks and to other linears."""
    model, adapter = model_of(family)
    main = model.get_submodule(f"{adapter.blocks}.1.{linear}")
    before = logits_of(model)
    add_bias(main, torch.randn(16))
    assert main.bias is not None
    assert distance(logits_of(model), before) > 10 * SURGERY
    keep = 1 if name == "heads" else 7
    cuts = evenly(adapter, model, name, keep)
    expected = logits_of(masked(model, adapter, cuts))
    channels = get_coupling(adapter, name).resolve(adapter.blocks_of(model)[cuts[0].block])
    size = size_of(model) - 16 - 3 * channels.cost * (channels.units - keep)
    shrink(model, adapter, cuts)
    assert size_of(model) == size + 3 * added
    assert distance(logits_of(model), expected) <= SURGERY
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(opened), logits_of(model))
    if name == "inner":
        assert all(block.mixer.use_bias for block in model.get_submodule(adapter.blocks))


def test_models_that_have_the_biases_already() -> None:
    model, adapter = model_of("llama", attention_bias=True, mlp_bias=True)
    names = ["mlp", "heads"]
    cuts = random_cuts(model, adapter, names, uniform=True)
    expected = logits_of(masked(model, adapter, cuts))
    shrink(model, adapter, cuts)
    assert distance(logits_of(model), expected) <= SURGERY
    assert model.model.layers[0].self_attn.q_proj.bias.shape == (8,)
    assert model.model.layers[0].mlp.down_proj.bias.shape == (16,)


def test_opt_without_biases_gets_all_of_them() -> None:
    model, adapter = model_of("opt", enable_bias=False)
    add_bias(model.model.decoder.layers[0].fc2, torch.randn(16))
    cuts = evenly(adapter, model, "mlp", 7)
    expected = logits_of(masked(model, adapter, cuts))
    shrink(model, adapter, cuts)
    assert model.config.enable_bias
    assert distance(logits_of(model), expected) <= SURGERY


def test_adding_to_a_bias_that_is_there() -> None:
    linear = nn.Linear(3, 2, dtype=torch.bfloat16)
    before = linear.bias
    expected = before.detach() + torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    add_bias(linear, torch.tensor([1.0, 2.0]))
    assert linear.bias is before
    assert torch.equal(linear.bias, expected)


@pytest.mark.parametrize(
    ("family", "linear"),
    [
        ("mistral", "mlp.down_proj"),
        ("mistral", "self_attn.o_proj"),
        ("qwen2", "self_attn.o_proj"),
        ("qwen3", "mlp.down_proj"),
        ("mamba", "mixer.x_proj"),
    ],
)
def test_biases_without_a_place(family: str, linear: str) -> None:
    model, adapter = model_of(family)
    assert not holds_bias(model, adapter, linear)
    module = model.get_submodule(f"{adapter.blocks}.1.{linear}")
    add_bias(module, torch.randn(len(module.weight)))
    before = state_of(model)
    with pytest.raises(UsageError, match=f"bias of {linear}: choose format 'native', or a"):
        shrink(model, adapter, evenly(adapter, model, names_of(family)[0], 7))
    assert state_of(model) == before
    expected = logits_of(model)
    shrink(model, adapter, [], format="native")
    assert torch.equal(logits_of(model), expected)


@pytest.mark.parametrize(
    ("family", "linear"),
    [("opt", "fc2"), ("llama", "mlp.down_proj"), ("qwen2", "self_attn.q_proj")],
)
def test_biases_with_a_place(family: str, linear: str) -> None:
    assert holds_bias(*model_of(family), linear)

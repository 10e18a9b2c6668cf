"""Context length: found under every name that configurations use."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from layerwise.errors import UsageError
from layerwise.run.data.context import NAMES, context_length
from layerwise.run.data.perplexity import perplexity
from layerwise.run.settings import CalibrationData

CONFIGURATIONS: dict[str, tuple[dict[str, Any], int | None]] = {
    "llama": ({"max_position_embeddings": 64}, 64),
    "gpt2": ({"n_positions": 48}, 48),
    "mpt": ({"max_seq_len": 40}, 40),
    "gemma3": ({"text_config": {"max_position_embeddings": 56}}, 56),
    "xlnet": ({}, None),  # -1: not limited
    "bloom": ({"seq_length": 72}, 72),  # as in its config.json
    "mamba": ({}, None),
}


@pytest.mark.parametrize("family", CONFIGURATIONS)
def test_families(family: str) -> None:
    fields, expected = CONFIGURATIONS[family]
    assert context_length(CONFIG_MAPPING[family](**fields)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_every_form(name: str) -> None:
    for value, expected in ((9, 9), (0, None), (-1, None), (None, None), ("9", None)):
        assert context_length(SimpleNamespace(**{name: value})) == expected
    both = SimpleNamespace(**{NAMES[0]: -1, name: 7})
    assert context_length(both) == 7


def test_a_limit_under_another_name_decides() -> None:
    """Default length, refusal of a longer one, and perplexity agree."""
    family: Any = CONFIG_MAPPING["mpt"]
    config = family(
        vocab_size=32, d_model=16, n_heads=4, n_layers=1, expansion_ratio=1, max_seq_len=24
    )
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config).eval()
    assert CalibrationData(None).length_for(model) == 24
    with pytest.raises(UsageError, match="exceeds the 24 positions"):
        CalibrationData(None, sequence_length=25).length_for(model)
    ids = torch.arange(60) % 32
    assert perplexity(model, ids, sequence_length=24) > 1
    with pytest.raises(UsageError, match="the model has 24 positions"):
        perplexity(model, ids, sequence_length=25)

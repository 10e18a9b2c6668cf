"""Structured runs on tiny models: the settings that the tests share."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from layerwise.run.data.calibration import token_windows
from layerwise.run.prune import prune_model
from layerwise.run.report import PruneReport
from tests.support.models import VOCABULARY, random_tokens

SEQUENCES, LENGTH = 6, 12
FAMILIES = ("opt", "llama", "mamba", "falcon_mamba")
RUNS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fasp": {"method": "fasp"},
        "fasp native": {"method": "fasp", "format": "native"},
        "flap": {"method": "flap"},
        "flap native": {"method": "flap", "format": "native"},
        "flap padded": {"method": "flap", "format": "padded"},
        "columns": {"method": "columns"},
        "columns native": {"method": "columns", "format": "native"},
        "heads native": {"method": "columns", "pattern": "heads", "format": "native"},
        "wanda": {"method": "wanda", "pattern": "columns"},
    }
)


def smaller(source: Any, **options: Any) -> PruneReport:
    """Run with units of one channel, because the tiny models are narrow."""
    given = {
        "method": "fasp",
        "sparsity": 0.3,
        "multiple": 1,
        "calibration": random_tokens(20, LENGTH, seed=3).flatten(),
        "n_sequences": SEQUENCES,
        "sequence_length": LENGTH,
        **options,
    }
    return prune_model(source, **given)


def windows() -> Tensor:
    """The calibration windows of :func:`smaller`."""
    stream = random_tokens(20, LENGTH, seed=3).flatten()
    return token_windows(
        stream,
        None,
        n_sequences=SEQUENCES,
        sequence_length=LENGTH,
        seed=0,
        vocab_size=VOCABULARY,
    ).tokens


@torch.no_grad()
def inputs_of(model: Any, name: str) -> Tensor:
    """Inputs of a linear on the calibration windows, shape (tokens, in), float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].double().flatten(0, -2))
    )
    model(input_ids=windows())
    handle.remove()
    return torch.cat(seen)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits on tokens that no run has seen."""
    found: Tensor = model(input_ids=random_tokens(3, LENGTH, seed=5)).logits.float()
    return found

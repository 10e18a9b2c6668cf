"""Runs of `prune_model` on a tiny text, from a folder and in memory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from layerwise.run.data.perplexity import perplexity
from layerwise.run.prune import prune_model
from layerwise.run.report import PruneReport
from tests.support.models import (
    random_tokens,
    save_checkpoint,
    tiny_model,
    tiny_text,
    tiny_tokenizer,
)

LENGTH = 12
TEXT = [tiny_text()]
SETTINGS: Mapping[str, Any] = {
    "calibration": TEXT,
    "n_sequences": 6,
    "sequence_length": LENGTH,
}


def sharded_llama(folder: Path) -> Path:
    """Two blocks in bfloat16, in several shards."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    return save_checkpoint(folder, model, max_shard_size="9KB")


def by_path(
    source: Path, output: Path, method: Any = "wanda", **options: Any
) -> PruneReport:
    return prune_model(
        source, method, **{"sparsity": 0.5, "output_dir": output, **SETTINGS, **options}
    )


def in_memory(model: Any = None, method: Any = "wanda", **options: Any) -> PruneReport:
    return prune_model(
        model or tiny_model("llama"),
        method,
        **{"sparsity": 0.5, "tokenizer": tiny_tokenizer(), **SETTINGS, **options},
    )


def perplexity_of(model: Any) -> float:
    return perplexity(model, random_tokens(1, 60)[0], sequence_length=LENGTH)

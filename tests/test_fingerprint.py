"""The fingerprint of a run is a file format: renaming a class must not change it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.run.prune import prune_model
from layerwise.solve import chain
from layerwise.solvers.best import Best
from layerwise.solvers.sparsegpt import SparseGPT
from tests.support.models import random_tokens, save_checkpoint, tiny_model

TOKENS = random_tokens(6, 12)
COMMON: dict[str, Any] = {
    "bos": "never",
    "certify": None,
    "damping": 0.01,
    "device": "cpu",
    "error_correction": "block",
    "ignore": ["lm_head"],
    "n_sequences": 6,
    "seed": 0,
    "sequence_length": 12,
    "targets": ["Linear"],
}
NO_CHANNELS: dict[str, Any] = {
    "allocation": None,
    "format": None,
    "multiple": None,
    "pattern": None,
}


class Stop(Exception):
    """Ends a run where its journal would be opened."""


def sha256_of(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {"method": "sparsegpt", "sparsity": "2:4"},
            {
                **NO_CHANNELS,
                "method": "sparsegpt",
                "options": {},
                "sparsity": "2:4",
                "group": "row",
                "keep_zeros": False,
            },
        ),
        (
            {"method": chain(SparseGPT(block_size=4), Best()), "sparsity": 0.5},
            {
                **NO_CHANNELS,
                "method": "sparsegpt+best",
                "options": {"sparsegpt.block_size": 4},
                "sparsity": 0.5,
                "group": "row",
                "keep_zeros": False,
            },
        ),
        (
            {"method": "fasp", "sparsity": 0.3, "format": "native"},
            {
                "allocation": "uniform",
                "format": "native",
                "group": "row",
                "keep_zeros": None,
                "method": "fasp",
                "multiple": 8,
                "options": {},
                "pattern": "columns",
                "sparsity": 0.3,
            },
        ),
    ],
    ids=["n:m", "chain", "channels"],
)
def test_the_fingerprint_of_a_run_is_known(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    source = save_checkpoint(tmp_path / "model", tiny_model("llama"), tokenizer=False)
    kept: list[Any] = []

    def keep(journal: Any, output: Path, fingerprint: Any, **options: Any) -> None:
        kept.append(json.loads(json.dumps(fingerprint)))
        raise Stop

    monkeypatch.setattr("layerwise.run.pipeline.journal.Journal.__init__", keep)
    with pytest.raises(Stop):
        prune_model(
            source,
            **arguments,
            calibration=TOKENS,
            n_sequences=6,
            sequence_length=12,
            output_dir=tmp_path / "out",
        )
    (found,) = kept
    assert set(found.pop("versions")) == {
        "layerwise",
        "python",
        "safetensors",
        "torch",
        "transformers",
    }
    assert set(found.pop("weights")) == {path.name for path in source.iterdir()}
    assert found.pop("threads") == torch.get_num_threads()
    assert found.pop("calibration") == sha256_of(TOKENS)
    assert found == COMMON | expected

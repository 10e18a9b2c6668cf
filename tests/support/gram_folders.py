"""Grams of tiny models, and changes of their folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from layerwise.grams.collect_grams import collect_grams
from layerwise.run.checkpoints.hashes import file_sha256
from tests.support.models import save_checkpoint, tiny_model
from tests.support.pruning import CALIBRATION

MODELS = {"llama": torch.bfloat16, "gpt2": torch.float32, "opt": torch.float16}
FIRST = "00000-00.safetensors"
LAYERS = 14
TOKENS: dict[str, Any] = {
    "calibration": CALIBRATION,
    "n_sequences": len(CALIBRATION),
    "sequence_length": CALIBRATION.shape[1],
}


def collected(folder: Path, family: str) -> Path:
    """Grams of a tiny model, beside its checkpoint in the folder."""
    model = tiny_model(family, dtype=MODELS[family])
    save_checkpoint(folder / family, model, tokenizer=False)
    grams = folder / f"{family}-grams"
    collect_grams(folder / family, grams, **TOKENS)
    return grams


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def trust(folder: Path, name: str = FIRST) -> None:
    """Give the manifest the hash that a file has now."""
    digest = file_sha256(folder / name)
    edit_manifest(folder, lambda content: content["files"][name].update(sha256=digest))


def edit_file(folder: Path, file: str = FIRST, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = load_file(folder / file) | changes
    kept = {name: value for name, value in tensors.items() if value is not None}
    save_file(kept, folder / file)
    trust(folder, file)

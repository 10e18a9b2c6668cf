"""Small checkpoints to read, to copy and to damage."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.models import save_checkpoint, tiny_model

INDEX = "model.safetensors.index.json"


def tiny_opt() -> Any:
    return tiny_model("opt", tied=True)


def write_checkpoints(root: Path) -> dict[str, Path]:
    """OPT in shards and in one file, LLaMA with and without tied embeddings, by name."""
    opt = save_checkpoint(root / "opt", tiny_opt(), max_shard_size="12KB")
    (opt / "LICENSE").write_text("Apache-2.0")
    (opt / "README.md").write_text("# the original")
    save_checkpoint(root / "single", tiny_opt(), tokenizer=False)
    tied = tiny_model("llama", tied=True, dtype=torch.bfloat16)
    save_checkpoint(root / "llama-tied", tied, tokenizer=False)
    save_checkpoint(root / "llama", tiny_model("llama"), tokenizer=False)
    return {path.name: path for path in root.iterdir()}


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))

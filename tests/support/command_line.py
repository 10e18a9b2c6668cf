"""The workshop, a folder for commands: models, texts and recipes, good and bad."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.support.models import (
    SHARD,
    edit_shard,
    mixture_of_experts,
    save_checkpoint,
    tiny_model,
    tiny_text,
)

LINEARS = 14


def put_nan(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = torch.nan

    edit_shard(folder / SHARD, edit)


def cut_shard(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: len(content) // 2])


DAMAGES: Mapping[str, Callable[[Path], Any]] = {
    "nan": put_nan,
    "cut": cut_shard,
}


def fill_workshop(folder: Path) -> Path:
    """Folder with models, texts and recipes, good and bad."""
    save_checkpoint(folder / "llama", tiny_model("llama", dtype=torch.bfloat16))
    save_checkpoint(folder / "odd", tiny_model("llama", inner=26))
    save_checkpoint(folder / "mixture", mixture_of_experts())
    save_checkpoint(folder / "mute", tiny_model("llama"), tokenizer=False)
    for name, damage in DAMAGES.items():
        damage(shutil.copytree(folder / "llama", folder / name))
    (folder / "text.txt").write_text(tiny_text())
    (folder / "empty.txt").write_text(" \n")
    (folder / "short.txt").write_text("a b")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "text.jsonl").write_text(json.dumps({"text": tiny_text()}) + "\n")
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{\n')
    (folder / "recipe.yaml").write_text("method: wanda\nsparsity: 2:4\nn_sequences: 4\n")
    (folder / "bad.yaml").write_text("methods: wanda\n")
    return folder


@contextmanager
def kept_in_order(workshop: Path) -> Iterator[None]:
    """Remove the outputs of a command; all else must be as it was."""
    before = sorted(workshop.rglob("*"))
    yield
    for name in ("out", "out.partial", "again"):
        shutil.rmtree(workshop / name, ignore_errors=True)
    assert sorted(workshop.rglob("*")) == before


GOOD: Mapping[str, Any] = {
    "--method": "wanda",
    "--sparsity": "0.5",
    "--calibration": "text.txt",
    "--n-sequences": "4",
    "--sequence-length": "12",
    "--output": "out",
}


def flags(changes: Mapping[str, Any]) -> list[str]:
    """Flags of a small good run with some of them changed; None drops one."""
    merged = {**GOOD, **changes}
    model = merged.pop("MODEL", "llama")
    pairs = [[name, str(value)] for name, value in merged.items() if value is not None]
    return [
        "prune",
        *([model] if model else []),
        *(item for pair in pairs for item in pair),
    ]


def one_line(error: str) -> str:
    assert error.count("\n") == 1, error
    assert error.startswith("layerwise: "), error
    assert "Traceback" not in error
    return error

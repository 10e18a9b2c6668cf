"""Hostile and damaged gram folders: refused by name, or harmless."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import DataError
from layerwise.grams.solve_grams import solve_grams
from tests.support.gram_folders import (
    FIRST,
    LAYERS,
    collected,
    edit_file,
    edit_manifest,
    trust,
)


@pytest.fixture(scope="module")
def grams(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collected(tmp_path_factory.mktemp("hostile"), "llama")


def cut(folder: Path) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[: len(content) // 2])


def cut_and_trust(folder: Path) -> None:
    cut(folder)
    trust(folder)


def flip(folder: Path) -> None:
    content = bytearray((folder / FIRST).read_bytes())
    content[-1] ^= 1
    (folder / FIRST).write_bytes(content)


def rename(folder: Path, name: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["files"] = {name: content["files"][FIRST]}

    edit_manifest(folder, edit)


def link_away(folder: Path) -> None:
    (folder / FIRST).rename(folder.parent / "elsewhere")
    (folder / FIRST).symlink_to(folder.parent / "elsewhere")


def rename_layer(content: dict[str, Any]) -> None:
    layers = content["files"][FIRST]["layers"]
    layers["other"] = layers.pop("model.layers.0.self_attn.q_proj")


def repeat_layer(content: dict[str, Any]) -> None:
    content["files"]["00009-00.safetensors"] = content["files"][FIRST]


NAN = torch.eye(16, dtype=torch.float64)
NAN[2, 3] = torch.nan
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, rf"{FIRST} has the sha256"),
    "truncated, hash adjusted": (cut_and_trust, rf"{FIRST} is not a usable safetensors"),
    "one bit": (flip, rf"{FIRST} has the sha256 .* the manifest says"),
    "no gram": (lambda f: edit_file(f, gram=None), rf"{FIRST} has no gram of layer"),
    "NaN": (lambda f: edit_file(f, gram=NAN), rf"{FIRST}: gram contains nan at \(2, 3\)"),
    "no file": (
        lambda f: (f / FIRST).unlink(),
        rf"{FIRST} is listed in the manifest but missing",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "holds no manifest.json"),
    "leaves by name": (lambda f: rename(f, f"../{FIRST}"), "manifest.json lists the file"),
    "absolute name": (lambda f: rename(f, f"/tmp/{FIRST}"), "manifest.json lists the file"),
    "hidden name": (lambda f: rename(f, f".{FIRST}"), "manifest.json lists the file"),
    "leaves by link": (link_away, rf"{FIRST} is a link that leaves the folder"),
    "another layer": (
        lambda f: edit_manifest(f, rename_layer),
        rf"{FIRST} holds other layers",
    ),
    "a layer twice": (lambda f: edit_manifest(f, repeat_layer), "lists the layer .* twice"),
    "no layers": (lambda f: edit_manifest(f, lambda c: c.update(files={})), "no layer"),
    "another format": (
        lambda f: edit_manifest(f, lambda c: c.update(format=2)),
        "format 2, this layerwise reads 1",
    ),
    "unknown key": (
        lambda f: edit_manifest(f, lambda c: c.update(more=1)),
        "manifest.json is damaged: more",
    ),
    "no JSON": (lambda f: (f / "manifest.json").write_text("{"), "not usable JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders(name: str, grams: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    folder = tmp_path / "grams"
    folder.mkdir()
    for path in grams.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert len(solve_grams(folder, "magnitude", 0.5).records) == LAYERS
    damage(folder)
    with pytest.raises(DataError, match=words):
        solve_grams(folder, "magnitude", 0.5, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()

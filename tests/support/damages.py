"""Damages of a checkpoint folder, by a hostile author or a bad download."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import INDEX, edit_json


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def redirect(folder: Path, old: str, new: str) -> None:
    edit_index(folder, lambda m: m.update({n: new for n, s in m.items() if s == old}))


def traverse(folder: Path) -> None:
    shard = first_shard(folder)
    secret = folder.parent / "secret"
    secret.mkdir()
    shutil.move(shard, secret / shard.name)
    redirect(folder, shard.name, f"../secret/{shard.name}")


def absolute(folder: Path) -> None:
    shard = first_shard(folder)
    redirect(folder, shard.name, str(shard))


def link_outside(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        inside = min(folder.glob(pattern))
        outside = inside.rename(folder.parent / "outside")
        inside.symlink_to(outside)

    return damage


def link_to_device(folder: Path) -> None:
    shard = first_shard(folder)
    shard.unlink()
    shard.symlink_to("/dev/zero")


def pipe(folder: Path) -> None:
    """Reading it would wait forever."""
    shard = first_shard(folder)
    shard.unlink()
    os.mkfifo(shard)


def folder_as_shard(folder: Path) -> None:
    shard = first_shard(folder)
    shard.unlink()
    shard.mkdir()


def truncate(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-7])


def with_header(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change the header of a shard and leave its data."""

    def damage(folder: Path) -> None:
        shard = max(folder.glob("model-*.safetensors"))  # of several tensors
        data = shard.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        edit(header)
        write_shard(shard, json.dumps(header).encode(), data[end:])

    return damage


def write_shard(path: Path, header: bytes, data: bytes) -> None:
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def entries_of(header: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for name, entry in header.items() if name != "__metadata__"]


def shift(by: int) -> Callable[[dict[str, Any]], None]:
    """Move the last tensor, so that it overlaps or leaves a hole."""

    def edit(header: dict[str, Any]) -> None:
        last = max(entries_of(header), key=lambda entry: entry["data_offsets"])
        last["data_offsets"] = [offset + by for offset in last["data_offsets"]]

    return edit


def empty_tensors(name: str, count: int) -> Callable[[dict[str, Any]], None]:
    """Tensors without bytes, all at the same place."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    return lambda header: header.update({name.format(i): entry for i in range(count)})


def negative_size(header: dict[str, Any]) -> None:
    entry = entries_of(header)[0]
    entry["shape"] = [-size for size in entry["shape"]]


def endless_header(folder: Path) -> None:
    data = first_shard(folder).read_bytes()
    first_shard(folder).write_bytes((2**62).to_bytes(8, "little") + data[8:])


def duplicate_header_key(folder: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    write_shard(first_shard(folder), b"{" + entry + b"," + entry + b"}", b"1")


def unlisted_tensor_gone(folder: Path) -> None:
    """Index and shard agree that there is no such tensor."""
    state = load_file(first_shard(folder))
    gone = min(state)
    state.pop(gone)
    save_file(state, first_shard(folder), metadata={"format": "pt"})
    edit_index(folder, lambda weight_map: weight_map.pop(gone))


def remove_tensor(folder: Path) -> None:
    state = load_file(first_shard(folder))
    state.pop(min(state))
    save_file(state, first_shard(folder), metadata={"format": "pt"})


def tensor_in_two_shards(folder: Path) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    state = load_file(shards[0])
    extra = dict(sorted(load_file(shards[1]).items())[:1])
    save_file(state | extra, shards[0], metadata={"format": "pt"})


def weight_with(value: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        name = "model.decoder.layers.1.fc2.weight"
        shard = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
        state = load_file(shard)
        state[name][3, 5] = state[name][4, 0] = value
        save_file(state, shard, metadata={"format": "pt"})

    return damage


def no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def pickles_only(folder: Path) -> None:
    no_weights(folder)
    torch.save({}, folder / "pytorch_model.bin")


def duplicate_key(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "model_type": "llama"}')


def config_with(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def foreign_tokenizer(folder: Path) -> None:
    """Its class comes with the checkpoint."""
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    (folder / "tokenizer.json").unlink()
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
    )


def foreign_code(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('executed')")
    values = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(folder / "config.json", model_type="nope", auto_map=values)

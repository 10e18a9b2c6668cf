"""Checks of a checkpoint folder before anything else may open it.

The folder may be damaged or hostile. So file names are confined to the folder, pickles are
never read, and every header is checked and compared with the index. A configuration that
would make transformers fetch code or other files is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, UnsupportedModelError, one_line
from layerwise.run.checkpoints.config_bounds import check_counts
from layerwise.run.checkpoints.files import check_regular
from layerwise.run.checkpoints.plain_config import check_types, refuse_quantised
from layerwise.run.checkpoints.shard import read_header
from layerwise.run.checkpoints.strict_json import read_object

SINGLE_SHARD = "model.safetensors"
ADAPTER = "adapter_config.json"
INDEX = "model.safetensors.index.json"
SHOWN = 40  # characters of a key or value in a message
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DISTRIBUTED_SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")


def locate(name_or_path: str | os.PathLike[str], patterns: Iterable[str]) -> Path:
    """Local folder of a path, or of a hub name after downloading ``patterns``."""
    name = os.fspath(name_or_path)
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        message = f"{path} is a file: name the folder that holds config.json"
        raise DataError(message)
    if not HUB_NAME.fullmatch(name):
        message = f"there is no folder {name}: check the path"
        raise DataError(message)
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(name, allow_patterns=list(patterns))
    except Exception as error:
        message = (
            f"there is no folder {name}, and the hub does not serve it: {one_line(error)}"
        )
        raise DataError(message) from error
    return Path(snapshot)


def confined(path: Path) -> Path:
    """Return the path of a file, or raise if it leads out of its checkpoint folder.

    The download cache of the hub is a folder of links into ``blobs``, which are allowed.
    """
    folder = path.parent
    if folder.name == "additional_chat_templates":
        folder = folder.parent
    allowed = [folder.resolve()]
    snapshots = folder.absolute().parent
    if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
        repository = snapshots.parent.resolve()
        allowed += [repository / "blobs", repository.parent / "blobs"]
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        message = f"cannot read {path}: {one_line(error)}; restore the file"
        raise DataError(message) from error
    if not any(target.is_relative_to(root) for root in allowed):
        message = f"{path} is a link that leaves the folder: replace it by the file"
        raise DataError(message)
    return check_regular(path)


def refuse_adapter(path: Path) -> None:
    """Refuse a folder with an adapter of peft, alone or beside the weights of a model.

    Where peft is installed, transformers loads the adapter and the model that it names,
    instead of the weights in the folder.
    """
    if not (path / ADAPTER).is_file():
        return
    if (path / "config.json").is_file():
        message = (
            f"{path} holds an adapter ({ADAPTER}) beside a model, and transformers would "
            f"load another model with it: move {ADAPTER} to another folder, if its "
            f"weights are merged"
        )
    else:
        message = (
            f"{path} holds an adapter ({ADAPTER}) without its model: merge_and_unload() "
            f"it with peft, then save_pretrained() the result"
        )
    raise DataError(message)


def read_weight_map(path: Path) -> dict[str, str]:
    """Shard of every tensor, from the headers, which must agree with the index."""
    if (path / SINGLE_SHARD).exists():  # like transformers, prefer it to an index
        listed: dict[str, str] = {}
        shards = [SINGLE_SHARD]
    elif (path / INDEX).exists():
        listed = _read_index(confined(path / INDEX))
        shards = sorted(set(listed.values()))
    else:
        raise DataError(_no_weights(path))
    weight_map: dict[str, str] = {}
    for shard in shards:
        if not (path / shard).exists():
            message = f"{path / shard} is missing: download the checkpoint again"
            raise DataError(message)
        confined(path / shard)
        for name in read_header(path / shard).tensors:
            if name in weight_map:
                message = (
                    f"{path}: tensor {name!r} is in {weight_map[name]} and in {shard}; "
                    f"download the checkpoint again"
                )
                raise DataError(message)
            weight_map[name] = shard
    for name, shard in listed.items():
        if weight_map.get(name) != shard:
            message = (
                f"{path / shard} lacks tensor {name!r}, which the index lists there: "
                f"download the checkpoint again"
            )
            raise DataError(message)
    return dict(sorted(weight_map.items()))


def _read_index(path: Path) -> dict[str, str]:
    """Weight map of an index file, where every value must be a plain file name."""
    index = read_object(path)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        message = f"{path} has no weight_map: restore the file"
        raise DataError(message)
    for name, shard in listed.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard)
        if not plain or shard.startswith("."):
            message = (
                f"{path} maps tensor {name!r} to {shard!r}: shards must be *.safetensors "
                f"files in the same folder"
            )
            raise DataError(message)
    if not isinstance(index.get("metadata"), dict):
        message = f"{path} has no metadata, so transformers does not open it: add {{}}"
        raise DataError(message)
    return listed


def _no_weights(path: Path) -> str:
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLES)
    if not pickled:
        return f"{path} has no {SINGLE_SHARD} and no index: choose a safetensors model"
    return (
        f"{path} has only pickled weights ({pickled[0]}), which are never loaded: if you "
        f"trust them, load them elsewhere and save_pretrained() as safetensors"
    )


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse a configuration that makes transformers read other files or foreign code."""
    where = path / "config.json"
    if not isinstance(config.get("model_type"), str):
        message = f"{where} names no model_type: restore the file"
        raise DataError(message)
    check_counts(config, where)
    check_types(config, where)
    refuse_quantised(config, path)
    if config.get("transformers_weights"):
        message = f"{where} redirects the weights (transformers_weights): remove the key"
        raise DataError(message)
    for key, value in _walk(config):
        if key.endswith("attn_implementation") and "/" in str(value):
            shown = f"{key[:SHOWN]}: {str(value)[:SHOWN]}"
            message = f"{where} requires code from the hub ({shown}): remove it"
            raise UnsupportedModelError(message)
    names = (file.name for file in path.iterdir())
    if shards := [name for name in names if DISTRIBUTED_SHARD.fullmatch(name)]:
        message = f"{path} is a distributed checkpoint ({shards[0]}): merge its shards"
        raise UnsupportedModelError(message)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of nested objects."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)

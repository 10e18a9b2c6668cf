"""Checkpoints on disk: read and write safetensors, validated before use.

A checkpoint is a folder with ``config.json`` and safetensors shards; see
:mod:`layerwise.run.checkpoints.validation` for the checks. A pruned copy differs from its
source only in the bytes of the replaced tensors.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.errors import DataError, UsageError, one_line
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.bitmask import pack_mask, unpack_mask
from layerwise.run.checkpoints.files import copy_file
from layerwise.run.checkpoints.hashes import file_sha256
from layerwise.run.checkpoints.plain_config import is_plain, plain_bytes
from layerwise.run.checkpoints.shard import (
    TensorEntry,
    check_substitute,
    read_header,
    rewrite_shard,
)
from layerwise.run.checkpoints.strict_json import read_object
from layerwise.run.checkpoints.validation import (
    INDEX,
    SINGLE_SHARD,
    check_config,
    confined,
    locate,
    read_weight_map,
    refuse_adapter,
)
from layerwise.run.steps import counted

__all__ = [
    "Checkpoint",
    "atomic_write",
    "pack_mask",
    "unpack_mask",
    "write_checkpoint",
]

SIDE_FILES = (  # what transformers reads, and what a licence asks to keep
    "*config*.json",
    "*token*.json",
    "*vocab*.json",
    "*_map.json",
    "chat_template*.json",
    "tekken.json",
    "normalizer.json",
    "surgery.json",  # of the native format
    "*vocab*.txt",
    "*merges*.txt",
    "dict.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
CODE = "*.py"  # only of a model whose configuration names code of its own


@dataclass(frozen=True)
class Checkpoint:
    """A validated folder of safetensors; make one with :meth:`open`.

    Attributes
    ----------
    path
        The folder.
    config
        Parsed ``config.json``.
    weight_map
        Shard file of every tensor, sorted by tensor name.
    """

    path: Path
    config: dict[str, Any]
    weight_map: dict[str, str]

    @classmethod
    def open(cls, name_or_path: str | os.PathLike[str]) -> Checkpoint:
        """Validate a local folder, or download a model from the hub and validate it.

        Raises
        ------
        DataError
            The folder or a file is missing, damaged, pickled, or links out of the folder.
        UnsupportedModelError
            The weights are quantised or the configuration requires foreign code.
        """
        path = locate(name_or_path, (*SIDE_FILES, CODE, "model*.safetensors"))
        refuse_adapter(path)
        if not (path / "config.json").exists():
            message = f"{path} has no config.json: it is not a model folder"
            raise DataError(message)
        config = read_object(confined(path / "config.json"))
        check_config(config, path)
        checkpoint = cls(path, config, read_weight_map(path))
        for name in checkpoint.side_files():
            confined(path / name)
        return checkpoint

    @property
    def shards(self) -> list[str]:
        """File names of the shards, sorted."""
        return sorted(set(self.weight_map.values()))

    def side_files(self) -> list[str]:
        """Files that are copied with the weights: configuration, tokenizer, licence."""
        indexed = not (self.path / SINGLE_SHARD).exists()
        patterns = (*SIDE_FILES, CODE) if "auto_map" in self.config else SIDE_FILES
        names = {
            path.relative_to(self.path).as_posix()
            for pattern in patterns
            for path in self.path.glob(pattern)
            if not path.is_dir() and not path.name.startswith(".")
        }
        indexes = {name for name in names if name.endswith(".index.json")}
        return sorted(names - indexes | ({INDEX} if indexed else set()))

    def copy_side_file(self, name: str, folder: Path) -> None:
        """Copy a side file to a folder: config.json without keys that say nothing."""
        target = folder / name
        try:
            target.parent.mkdir(exist_ok=True)
        except OSError as error:
            message = f"cannot copy {self.path / name} to {target}: {one_line(error)}"
            raise DataError(message) from error
        if name == "config.json" and not is_plain(self.config):
            atomic_write(target, plain_bytes(self.config))
        else:
            copy_file(self.path / name, target)

    def entries(self) -> dict[str, TensorEntry]:
        """Type, shape and size of every tensor, from the headers alone."""
        entries: dict[str, TensorEntry] = {}
        for shard in self.shards:
            entries |= read_header(self.path / shard).tensors
        return {name: entries[name] for name in self.weight_map}

    def tensors(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Stream tensors with their names, shard by shard, one in memory at a time."""
        wanted = set(self.weight_map) if names is None else set(names)
        if unknown := sorted(wanted - set(self.weight_map)):
            message = f"{self.path} holds no tensor {unknown[0]!r}: check the name"
            raise UsageError(message)
        for shard in sorted({self.weight_map[name] for name in wanted}):
            try:
                with safe_open(self.path / shard, framework="pt") as file:
                    for name in sorted(wanted):
                        if self.weight_map[name] == shard:
                            yield name, file.get_tensor(name)
            except (SafetensorError, OSError) as error:
                message = f"cannot read {self.path / shard}: {one_line(error)}"
                raise DataError(message) from error

    def sha256(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Hash of some files, or of every file of the checkpoint, by name."""
        files = [*self.side_files(), *self.shards] if names is None else names
        chosen = sorted(files)
        hashed = counted(chosen, len(chosen), f"hashing {len(chosen)} files of {self.path}")
        return {name: file_sha256(self.path / name) for name in hashed}


def write_checkpoint(
    source: Checkpoint,
    output: Path,
    replaced: Mapping[str, Tensor],
    *,
    overwrite: bool = False,
) -> None:
    """Write a copy of a checkpoint in which some tensors have new values.

    Shards keep their names, headers and every byte of the other tensors; index,
    configuration, tokenizer and licence are copied. Every file is written atomically, with
    one tensor in memory. ``config.json`` is written last: a folder without it is
    incomplete.

    Parameters
    ----------
    source
        The checkpoint to copy.
    output
        An existing folder without any of the files to be written.
    replaced
        New values by the name in the checkpoint, of the same type and shape. Each is read
        twice, to check and to write it, and not kept.
    overwrite
        Replace existing files, as a resumed run does.

    Raises
    ------
    UsageError
        A name, type or shape does not fit, or a file already exists.
    DataError
        The disk is full or cannot be written.
    """
    entries = source.entries()
    for name, tensor in replaced.items():
        check_substitute(name, tensor, entries.get(name), source.path)
    last = ["config.json"]
    side_files = [name for name in source.side_files() if name not in last] + last
    _check_output(source, output, [*source.shards, *side_files], overwrite)
    for shard in source.shards:
        inside = {name for name in replaced if source.weight_map[name] == shard}
        rewrite_shard(source.path / shard, output / shard, replaced, inside)
    for name in side_files:
        source.copy_side_file(name, output)


def _check_output(
    source: Checkpoint, output: Path, names: list[str], overwrite: bool
) -> None:
    """Refuse an output folder that is missing or occupied, or whose disk is too small."""
    if not output.is_dir():
        message = f"output folder {output} does not exist: create it first"
        raise UsageError(message)
    if output.resolve() == source.path.resolve():
        message = f"output folder {output} is the source: choose another folder"
        raise UsageError(message)
    present = [name for name in names if (output / name).exists()]
    if present and not overwrite:
        message = f"{output} already holds {present[0]}: choose an empty folder"
        raise UsageError(message)
    needed = sum((source.path / name).stat().st_size for name in names)
    needed -= sum((output / name).stat().st_size for name in present)
    if needed > (free := shutil.disk_usage(output).free):
        message = f"{output} needs {needed} bytes but its disk has {free}: free some space"
        raise DataError(message)

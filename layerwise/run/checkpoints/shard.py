"""One safetensors file: its header, and copies with some tensors replaced.

The format is an 8-byte little-endian length, a JSON header and the data. Every tensor is a
byte range relative to the start of the data. A replacement has the same type and shape,
hence the same range, so a copy keeps all other bytes.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.files import CHUNK_BYTES, open_regular
from layerwise.run.checkpoints.strict_json import parse_json

LARGE_HEADER = 1 << 20  # bytes; about ten thousand tensors

TYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


FLOATS = {
    TYPE_NAMES[dtype]: dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Entry of one tensor in the header; ``dtype`` is the name that safetensors uses."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes, relative to the start of the data
    stop: int

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in the file."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """Header of a safetensors file; ``tensors`` is in the order of the data."""

    metadata: dict[str, str]
    tensors: dict[str, TensorEntry]
    data_start: int


def read_header(path: Path) -> Header:
    """Header of a complete, well-formed safetensors file.

    The safetensors library checks the file first: size of the header, ranges without holes
    or overlaps, nothing truncated.

    Raises
    ------
    DataError
        The file is missing, unreadable, truncated or not safetensors, or its header is
        large and longer than the data.
    """
    _check_proportion(path)
    try:
        with safe_open(path, framework="pt"):
            pass
        with open_regular(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length)
    except (SafetensorError, OSError) as error:
        message = f"{path} is not a usable safetensors file: {error}; download it again"
        raise DataError(message) from error
    values = parse_json(raw, f"header of {path}")
    metadata = values.pop("__metadata__", None) or {}
    entries = {
        name: TensorEntry(value["dtype"], tuple(value["shape"]), *value["data_offsets"])
        for name, value in values.items()
    }
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    return Header(metadata, dict(ordered), 8 + length)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise read errors with the right file name, even while another file is written."""
    try:
        yield
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}; check the file"
        raise DataError(message) from error


def _check_proportion(path: Path) -> None:
    """Refuse a huge header with little data: even an empty tensor costs time to read."""
    with _reading(path), open_regular(path) as stream:
        size = path.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
    n_bytes = size - 8 - length
    if length > LARGE_HEADER and 0 <= n_bytes < length:
        message = (
            f"{path} describes {n_bytes} bytes of tensors with a header of {length} bytes: "
            f"download it again"
        )
        raise DataError(message)


def rewrite_shard(
    source: Path,
    target: Path,
    replaced: Mapping[str, Tensor],
    names: Collection[str] | None = None,
) -> None:
    """Copy a safetensors file, with new values for some of its tensors.

    Memory: one replaced tensor. The header is copied; ``format: pt`` is added if it is
    missing.

    Parameters
    ----------
    source, target
        The file to read and the one to write (atomically).
    replaced
        New values by name; type and shape must be those in the file.
    names
        Names of `replaced` that belong to this file; by default all.

    Raises
    ------
    UsageError
        A name is not in the file, or a type or shape differs.
    DataError
        The source is damaged or the target cannot be written.
    """
    header = read_header(source)
    chosen = set(replaced if names is None else names)
    if unknown := sorted(chosen - set(header.tensors)):
        message = f"{source} holds no tensor {unknown[0]!r} to replace: check the name"
        raise UsageError(message)
    with _reading(source):
        start = _header_bytes(source, header)
        size = len(start) + source.stat().st_size - header.data_start

    def write(stream: BinaryIO) -> None:
        stream.write(start)
        with open_regular(source) as original:
            for name, entry in header.tensors.items():
                if name in chosen:
                    tensor = replaced[name]
                    check_substitute(name, tensor, entry, source)
                    stream.write(_tensor_bytes(tensor))
                else:
                    with _reading(source):
                        original.seek(header.data_start + entry.start)
                    _copy_bytes(original, stream, entry.n_bytes, source)

    atomic_write(target, write, size=size)


def check_substitute(
    name: str, tensor: Tensor, entry: TensorEntry | None, where: Path
) -> None:
    """Raise a UsageError unless ``tensor`` has the type and shape of the file's entry."""
    if entry is None:
        message = f"{where} holds no tensor {name!r} to replace: check the name"
        raise UsageError(message)
    given = TYPE_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
    if given != (entry.dtype, entry.shape):
        message = (
            f"tensor {name!r} is {entry.dtype} {entry.shape} in {where}, but its "
            f"replacement is {given[0]} {given[1]}: cast and reshape it first"
        )
        raise UsageError(message)


def write_shard(
    target: Path,
    like: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file whose tensors are made one by one during writing.

    Parameters
    ----------
    target
        The file to write (atomically).
    like
        Type and shape of every tensor.
    read
        Function from a name to its tensor; called once per tensor.
    metadata
        Metadata of the header.
    """
    entries, start = {}, 0
    for name, (dtype, shape) in sorted(like.items()):
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = TensorEntry(TYPE_NAMES[dtype], tuple(shape), start, stop)
        start = stop
    head = _header_text({"__metadata__": dict(metadata)}, entries)

    def write(stream: BinaryIO) -> None:
        stream.write(head)
        for name, entry in entries.items():
            tensor = read(name)
            check_substitute(name, tensor, entry, target)
            stream.write(_tensor_bytes(tensor))

    atomic_write(target, write, size=len(head) + start)


def _header_bytes(source: Path, header: Header) -> bytes:
    """Length and header of the copy: the original bytes if they name a format."""
    if "format" in header.metadata:
        with open_regular(source) as stream:
            return stream.read(header.data_start)
    values: dict[str, object] = {"__metadata__": {"format": "pt"} | header.metadata}
    return _header_text(values, header.tensors)


def _header_text(values: dict[str, object], entries: Mapping[str, TensorEntry]) -> bytes:
    """Length and text of a header; `values` are its entries other than tensors."""
    for name, entry in entries.items():
        offsets = [entry.start, entry.stop]
        values[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": offsets,
        }
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data must start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _tensor_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().reshape(-1)  # row-major, copied only if needed
    return flat.view(torch.uint8).numpy().data


def _copy_bytes(source: BinaryIO, target: BinaryIO, count: int, where: Path) -> None:
    while count:
        with _reading(where):
            chunk = source.read(min(count, CHUNK_BYTES))
        if not chunk:
            message = f"{where} was truncated while it was read: restore the file"
            raise DataError(message)
        target.write(chunk)
        count -= len(chunk)

"""The journal of a run: atomic, per block, and refused to any other run.

Work happens in ``OUT.partial``. A finished block is one safetensors file with its stored
weights, its bit-packed masks and, in the header, its figures, so a block and its journal
lines appear together or not at all. ``layers.jsonl`` repeats the figures for people. A run
with the same fingerprint continues where the last one stopped; another is refused. At the
end the folder is renamed to ``OUT``.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints.atomic import atomic_write, remove_temporaries
from layerwise.run.checkpoints.bitmask import pack_mask, packed_size, unpack_mask
from layerwise.run.checkpoints.hashes import bytes_sha256, file_sha256
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.checkpoints.shard import write_shard
from layerwise.run.checkpoints.strict_json import read_object
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import PrunedBlock

FOLDER = "layerwise"  # inside the output folder: everything that is ours
FINGERPRINT = "fingerprint.json"
BLOCKS = "blocks"
LAYERS = "layers.jsonl"
MASKS = "masks.safetensors"
WEIGHT, MASK, BIAS = "weight:", "mask:", "bias:"
SHAPES = "shapes"
TEXT = "text"
DIGITS = 16  # of the hash of a block in the name of its file


class Journal:
    """Blocks that are done, in ``OUT.partial``.

    Parameters
    ----------
    output
        The folder that the run will become.
    fingerprint
        Everything that decides the bytes of the result.
    force
        Whether a finished `output` may be replaced, at the very end.
    resume
        Whether an unfinished run with the same fingerprint is continued; otherwise it is
        started over.
    """

    def __init__(
        self,
        output: Path,
        fingerprint: Mapping[str, Any],
        *,
        force: bool = False,
        resume: bool = True,
    ) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".partial")
        self._ours = self.folder / FOLDER
        self._fingerprint = json.loads(json.dumps(fingerprint))
        check_output(output, force=force)
        if self.folder.exists() and not self._is_fresh():
            self._continue(resume)
        else:
            self._begin()

    def _is_fresh(self) -> bool:
        """Whether the folder holds nothing, or what a run leaves that is killed at once."""
        ours = {self._ours, self._ours / BLOCKS}
        found = self.folder.rglob("*") if self.folder.is_dir() else [self.folder]
        return all(
            path in ours or path.name.startswith(f".{FINGERPRINT}.") for path in found
        )

    def _begin(self) -> None:
        try:
            (self._ours / BLOCKS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = (
                f"cannot create {self.folder}: {error.strerror}; choose another folder"
            )
            raise DataError(message) from error
        remove_temporaries(self._ours)
        try:
            text = json.dumps(self._fingerprint, indent=1, sort_keys=True)
            atomic_write(self._ours / FINGERPRINT, text.encode())
        except DataError:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _continue(self, resume: bool) -> None:
        path = self._ours / FINGERPRINT
        if not path.is_file():
            message = (
                f"{self.folder} exists and is no unfinished run of layerwise; remove it or "
                f"choose another output"
            )
            raise UsageError(message)
        if not resume:
            shutil.rmtree(self.folder)
            self._begin()
            return
        other = read_object(path)
        keys = sorted({*other, *self._fingerprint})
        differs = [key for key in keys if other.get(key) != self._fingerprint.get(key)]
        if differs:
            message = (
                f"{self.folder} is an unfinished run with another {', '.join(differs)}; "
                f"remove it, choose another output, or start over with --no-resume"
            )
            raise UsageError(message)
        remove_temporaries(self.folder)

    @property
    def blocks(self) -> Path:
        """Folder of the finished blocks."""
        return self._ours / BLOCKS

    def block_path(self, index: int) -> Path | None:
        """File of a finished block, or None if it is not there."""
        return next(iter(sorted(self.blocks.glob(f"{index:05d}-*.safetensors"))), None)

    def read_block(self, index: int) -> PrunedBlock | None:
        """Return a finished block, or None if it is not there.

        Raises
        ------
        DataError
            The file is damaged: its content is not what its name says.
        """
        path = self.block_path(index)
        if path is None:
            return None
        block = PrunedBlock()
        _check_content(path)
        try:
            with safe_open(path, framework="pt") as file:
                block.records = [
                    LayerRecord.from_dict(values)
                    for values in json.loads(file.metadata()["records"])
                ]
                for key in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                    if key.startswith(WEIGHT):
                        name, weight = key.removeprefix(WEIGHT), file.get_tensor(key)
                        packed = file.get_tensor(MASK + name)
                        block.weights[name] = weight
                        block.masks[name] = unpack_mask(packed, weight.shape)
                    elif key.startswith(BIAS):
                        block.biases[key.removeprefix(BIAS)] = file.get_tensor(key)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            message = f"{path} is damaged ({error}); delete it to redo that block"
            raise DataError(message) from error
        return block

    def write_block(self, index: int, block: PrunedBlock) -> None:
        """Store a finished block; after this call it survives anything."""
        write_block(self.blocks, index, block)

    def read_tensor(self, kind: str, index: int, linear: str) -> Tensor:
        """One weight or mask (``WEIGHT``, ``MASK``) of a finished block."""
        path = self.block_path(index)
        assert path is not None
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(kind + linear)
                if kind != MASK:
                    return tensor
                return unpack_mask(tensor, file.get_slice(WEIGHT + linear).get_shape())
        except (SafetensorError, OSError) as error:
            message = f"{path} is damaged ({error}); delete it to redo that block"
            raise DataError(message) from error

    def read_state(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """Tensors and text of a state that was stored by name, or None."""
        path = self._state_path(name)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return tensors, file.metadata()[TEXT]
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            message = f"{path} is damaged ({error}); delete it to redo that part"
            raise DataError(message) from error

    def write_state(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Store tensors and text under a name; after this call they survive anything."""
        ready = {key: tensor.contiguous() for key, tensor in tensors.items()}
        atomic_write(self._state_path(name), save(ready, metadata={TEXT: text}))

    def _state_path(self, name: str) -> Path:
        return self._ours / BLOCKS / f"{name}.safetensors"

    def write_layers(self, records: list[LayerRecord]) -> None:
        """Write ``layers.jsonl``: one line per matrix, in order."""
        lines = "".join(json.dumps(record.to_dict()) + "\n" for record in records)
        atomic_write(self._ours / LAYERS, lines.encode())

    def write_masks(
        self,
        masks: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Write ``masks.safetensors``: bit-packed masks, their shapes in the header.

        With the shapes, every mask is asked for once, when it is written.
        """
        shapes = shapes or {name: mask.shape for name, mask in masks.items()}
        listed = {name: list(shape) for name, shape in sorted(shapes.items())}
        write_shard(
            self._ours / MASKS,
            {n: (torch.uint8, [packed_size(shape)]) for n, shape in listed.items()},
            lambda name: pack_mask(masks[name]),
            {SHAPES: json.dumps(listed)},
        )

    def finish(self) -> None:
        """Rename the partial folder to the output, replacing an older one if forced.

        What a resumed run would need goes last, and an output that is replaced stays
        until the new one has its name.
        """
        replaced = _replaced(self.output)
        try:
            if self.output.exists():
                shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed
                self.output.rename(replaced)
            self.folder.rename(self.output)
        except OSError as error:
            if replaced.exists() and not self.output.exists():
                replaced.rename(self.output)
            message = f"cannot rename {self.folder} to {self.output}: {error.strerror}"
            raise DataError(message) from error
        _settle(self.output)

    def discard_if_empty(self) -> None:
        """Remove the partial folder of a run that stopped before its first block."""
        if not any((self._ours / BLOCKS).glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)


def write_block(folder: Path, index: int, block: PrunedBlock) -> None:
    """Store a finished block in a folder, by a name that tells its content.

    Two processes that do the same block write files that differ in their seconds alone.
    """
    tensors = {WEIGHT + name: weight for name, weight in block.weights.items()}
    tensors |= {MASK + name: pack_mask(mask) for name, mask in block.masks.items()}
    tensors |= {BIAS + name: bias for name, bias in block.biases.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    records = json.dumps([record.to_dict() for record in block.records])
    content = save(tensors, metadata={"records": records})
    name = f"{index:05d}-{bytes_sha256(content)[:DIGITS]}.safetensors"
    atomic_write(folder / name, content)


def _check_content(path: Path) -> None:
    """Raise unless a block file has the content that its name promises."""
    if file_sha256(path)[:DIGITS] != path.stem.rpartition("-")[2]:
        message = f"{path} is damaged: its content changed; delete it to redo that block"
        raise DataError(message)


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that exists or cannot be created, before any work is done.

    First, what a run was doing that was killed in :meth:`Journal.finish` is completed, or
    undone if the new folder had no name yet.
    """
    if output.name in ("", ".."):
        message = f"{output} has no name of its own; name the new folder"
        raise UsageError(message)
    _settle(output)
    if output.exists() and not force:
        message = f"{output} exists; choose another output, or replace it with --force"
        raise UsageError(message)
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        message = f"cannot create {output}: {parent} is not writable; choose another output"
        raise DataError(message)


def _replaced(output: Path) -> Path:
    """Where an output is while another one gets its name."""
    return output.with_name(f".{output.name}.replaced")


def _settle(output: Path) -> None:
    """Give a replaced output its name back, or remove what a finished run leaves.

    The fingerprint goes last: it tells a folder that is not tidy yet.
    """
    replaced, fingerprint = _replaced(output), output / FOLDER / FINGERPRINT
    partial = output.with_name(output.name + ".partial")
    try:
        if replaced.exists() and partial.exists() and not output.exists():
            replaced.rename(output)
        if fingerprint.is_file():
            for folder in (replaced, output / FOLDER / BLOCKS):
                if folder.exists():
                    shutil.rmtree(folder)
            fingerprint.unlink()
    except OSError as error:
        where = error.filename or output
        message = f"cannot tidy up {output}: {where}: {error.strerror or error}"
        raise DataError(message) from error


def read_layers(folder: Path) -> list[LayerRecord]:
    """Figures of a finished or unfinished run."""
    path = folder / FOLDER / LAYERS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [LayerRecord.from_dict(json.loads(line)) for line in lines]
    except FileNotFoundError:
        message = f"{folder} holds no {FOLDER}/{LAYERS}: it is no output of layerwise"
        raise DataError(message) from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        message = f"{path} is damaged: {error}"
        raise DataError(message) from error


def read_masks(folder: Path) -> LazyTensors:
    """Masks of a finished run, by parameter name; each is read when it is asked for."""
    path = folder / FOLDER / MASKS
    if not path.is_file():
        message = f"{folder} holds no {FOLDER}/{MASKS}: it is no output of layerwise"
        raise DataError(message)

    def read(name: str) -> Tensor:
        with _damage(path), safe_open(path, framework="pt") as file:
            return unpack_mask(file.get_tensor(name), shapes[name])

    with _damage(path), safe_open(path, framework="pt") as file:
        listed = json.loads(file.metadata()[SHAPES])
        shapes = {name: [int(size) for size in shape] for name, shape in listed.items()}
        names = list(file.keys())
        if set(names) != set(shapes):
            message = "masks and shapes differ"
            raise ValueError(message)
    return LazyTensors(names, read)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file raises into an error that names it."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        message = f"{path} is damaged: {error}"
        raise DataError(message) from error

"""The journal of a run: its finished blocks, written atomically, for the same run only.

A run works in ``OUT.partial``. A finished block is one safetensors file with its stored
weights, its bit-packed masks and, in the header, its figures. So a block and its journal
lines appear together or not at all. ``layers.jsonl`` repeats the figures for people. A run
with the same fingerprint continues where the last one stopped; another is refused. At the
end the folder is renamed to ``OUT``.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from layerwise.errors import DataError, UsageError, one_line
from layerwise.run.checkpoints.atomic import atomic_write, remove_temporaries
from layerwise.run.checkpoints.bitmask import pack_mask, packed_size, unpack_mask
from layerwise.run.checkpoints.files import read_bytes
from layerwise.run.checkpoints.hashes import bytes_sha256
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.checkpoints.shard import write_shard
from layerwise.run.checkpoints.strict_json import parse_json, read_object
from layerwise.run.pipeline.block_files import DIGITS, INPUTS, BlockFolder
from layerwise.run.pipeline.destination import (
    BLOCKS,
    FINGERPRINT,
    FOLDER,
    LAYERS,
    check_output,
    partial_path,
    replaced_path,
    settle,
)
from layerwise.run.pipeline.records import LayerRecord, read_records, record_lines
from layerwise.run.pipeline.solver_identity import UNKNOWN
from layerwise.run.pipeline.state_files import read_state, write_state

MASKS = "masks.safetensors"
SHAPES = "shapes"


class Journal(BlockFolder):
    """Finished blocks in ``OUT.partial``.

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
    total, parts
        Number of blocks, or of the parts that are stored as such, and what they are.
    """

    def __init__(
        self,
        output: Path,
        fingerprint: Mapping[str, Any],
        *,
        force: bool = False,
        resume: bool = True,
        total: int | None = None,
        parts: str = "blocks",
    ) -> None:
        self.output = output
        self.folder = partial_path(output)
        self._ours = self.folder / FOLDER
        self._total, self._parts = total, parts
        self._again = "run the same command to continue"
        if not resume:
            self._again = "run the same command without --no-resume to continue"
        self._fingerprint = json.loads(json.dumps(fingerprint))
        super().__init__(self._ours / BLOCKS, run_key(self._fingerprint))
        check_output(output, force=force)
        if self.folder.exists() and not self._is_fresh():
            self._continue(resume)
        else:
            self._begin()

    def _is_fresh(self) -> bool:
        """Whether the folder has no fingerprint yet, and no files of others."""
        ours = {self._ours, self._ours / BLOCKS}
        paths = self.folder.rglob("*") if self.folder.is_dir() else [self.folder]
        return all(
            path in ours or path.name.startswith(f".{FINGERPRINT}.") for path in paths
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
                f"{self.folder} exists and is not an unfinished run of layerwise; remove "
                f"it or choose another output"
            )
            raise UsageError(message)
        if not resume:
            shutil.rmtree(self.folder)
            self._begin()
            return
        other = read_object(path)
        keys = sorted({*other, *self._fingerprint})
        own = self._fingerprint
        differs = [k for k in keys if other.get(k) != own.get(k) or own.get(k) == UNKNOWN]
        if differs:
            message = (
                f"{self.folder} is an unfinished run with another {', '.join(differs)}; "
                f"remove it, choose another output, or start over with --no-resume "
                f"(resume=False)"
            )
            raise UsageError(message)
        remove_temporaries(self.folder)
        self.blocks.mkdir(exist_ok=True)
        self.take_over()

    def read_state(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        """Return tensors and text of a state that was stored under a name, or None."""
        return read_state(self._state_path(name), self.run)

    def write_state(self, name: str, tensors: Mapping[str, Tensor], text: str) -> None:
        """Store tensors and text under a name, atomically."""
        write_state(self._state_path(name), self.run, tensors, text)

    def _state_path(self, name: str) -> Path:
        return self._ours / BLOCKS / f"{name}.safetensors"

    def write_layers(self, records: list[LayerRecord]) -> None:
        """Write ``layers.jsonl``: one line per matrix, in order."""
        atomic_write(self._ours / LAYERS, record_lines(records).encode())

    def write_masks(
        self,
        masks: Mapping[str, Tensor],
        shapes: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """Write ``masks.safetensors``: bit-packed masks, with their shapes in the header.

        If the shapes are given, every mask is read only once, when it is written.
        """
        shapes = shapes or {name: mask.shape for name, mask in masks.items()}
        listed = {name: list(shape) for name, shape in sorted(shapes.items())}
        write_shard(
            self._ours / MASKS,
            {n: (torch.uint8, [packed_size(shape)]) for n, shape in listed.items()},
            lambda name: pack_mask(masks[name]),
            {SHAPES: json.dumps(listed)},
        )

    def publish(self, write: Callable[["Journal"], None]) -> None:
        """Call `write` to write the output into the partial folder, then rename it."""
        write(self)
        self.finish()

    def finish(self) -> None:
        """Rename the partial folder to the output, replacing an older one if forced.

        Files for a resumed run are removed last, and a replaced output is kept until the
        new one has its name.
        """
        replaced = replaced_path(self.output)
        try:
            if self.output.exists():
                shutil.rmtree(replaced, ignore_errors=True)  # of a run that was killed
                self.output.rename(replaced)
            self.folder.rename(self.output)
        except OSError as error:
            if replaced.exists() and not self.output.exists():
                replaced.rename(self.output)
            message = (
                f"cannot rename {self.folder} to {self.output}: {error.strerror}; start "
                f"the run again"
            )
            raise DataError(message) from error
        settle(self.output)

    @property
    def is_empty(self) -> bool:
        """Whether no block and no state is finished: inputs of blocks do not count."""
        files = self.blocks.glob("*.safetensors")
        return all(path.name.startswith(INPUTS) for path in files)

    @property
    def continued(self) -> str | None:
        """Line for the log of a run that another one began, or None."""
        if not self.files:
            return None
        return f"continuing: {len(self.files)} of {self._total} {self._parts} are there"

    def stop(self, error: BaseException) -> None:
        """Tidy up after a run that failed, and note on the error what is kept."""
        self.discard_if_empty()
        if self.folder.exists() and not self.is_empty:
            count = f" after {len(self.files)} of {self._total} {self._parts}"
            known = self._total is not None and self.files
            error.add_note(f"stopped{count if known else ''}; {self._again}")

    def discard_if_empty(self) -> None:
        """Remove the partial folder of a run that stopped before its first block."""
        if self.is_empty:
            shutil.rmtree(self.folder, ignore_errors=True)


def run_key(fingerprint: Mapping[str, Any]) -> str:
    """Short hash of a fingerprint, by which a block names its run."""
    return bytes_sha256(json.dumps(fingerprint, sort_keys=True).encode())[:DIGITS]


def read_layers(folder: Path) -> list[LayerRecord]:
    """Read the figures of a finished or unfinished run."""
    path = folder / FOLDER / LAYERS
    if not path.exists():
        message = f"{folder} holds no {FOLDER}/{LAYERS}: it is not an output of layerwise"
        raise DataError(message)
    with _damage(path):
        return read_records(read_bytes(path))


def read_masks(folder: Path) -> LazyTensors:
    """Masks of a finished run, by parameter name; each is read when it is used."""
    path = folder / FOLDER / MASKS
    if not path.is_file():
        message = f"{folder} holds no {FOLDER}/{MASKS}: it is not an output of layerwise"
        raise DataError(message)

    def read(name: str) -> Tensor:
        with _damage(path), safe_open(path, framework="pt") as file:
            return unpack_mask(file.get_tensor(name), shapes[name])

    with _damage(path), safe_open(path, framework="pt") as file:
        listed = parse_json(file.metadata()[SHAPES].encode(), SHAPES)
        shapes = {name: [int(size) for size in shape] for name, shape in listed.items()}
        names = list(file.keys())
        if set(names) != set(shapes):
            message = "masks and shapes differ"
            raise ValueError(message)
    return LazyTensors(names, read)


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn the errors of reading a damaged file into one that names the file."""
    try:
        yield
    except (
        SafetensorError,
        OSError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        OverflowError,
        DataError,
    ) as error:
        message = f"{path} is damaged: {one_line(error)}"
        raise DataError(message) from error

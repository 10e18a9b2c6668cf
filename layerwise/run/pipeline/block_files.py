"""Finished blocks as files: stored weights, bit-packed masks, and figures in the header.

A block and its figures appear together or not at all. The name of the file contains the
hash of its content.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import DataError, one_line
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.bitmask import pack_mask, unpack_mask
from layerwise.run.checkpoints.hashes import bytes_sha256, file_sha256
from layerwise.run.pipeline.records import read_records, record_lines
from layerwise.run.pipeline.results import PrunedBlock

WEIGHT, MASK, BIAS = "weight:", "mask:", "bias:"
INPUTS = "inputs-"  # begin of the names of files with the inputs of blocks
RECORDS, INDEX, RUN = "records", "index", "run"  # in the header
DIGITS = 16  # of the hash of the content, in the name of a file
FILE = re.compile(rf"(\d{{5,}})-[0-9a-f]{{{DIGITS}}}\.safetensors", re.ASCII)


class BlockFolder:
    """Finished blocks of one run, in a folder.

    A block is read from the file that this run wrote or took over, and from no other: a
    run that was killed may have workers that write for another moment.

    Parameters
    ----------
    blocks
        The folder.
    run
        Key of the run, which every file names.
    files
        Names of the files of finished blocks, by the index of the block.
    """

    def __init__(
        self, blocks: Path, run: str = "", files: Mapping[int, str] | None = None
    ) -> None:
        self.blocks = blocks
        self.run = run
        self.files = dict(files or {})

    def take_over(self) -> None:
        """Take over all blocks in the folder, as a resumed run does."""
        for path in sorted(self.blocks.iterdir()):
            if named := FILE.fullmatch(path.name):
                self.files[int(named[1])] = path.name

    def add_file(self, index: int, name: str) -> None:
        """Add a block that a worker of this run wrote."""
        self.files[index] = name

    def write_block(self, index: int, block: PrunedBlock) -> None:
        """Store a finished block, atomically."""
        self.add_file(index, write_block(self.blocks, index, block, self.run))

    def block_path(self, index: int) -> Path | None:
        """File of a finished block, or None if there is none."""
        name = self.files.get(index)
        return None if name is None else self.blocks / name

    def read_block(self, index: int) -> PrunedBlock | None:
        """Return a finished block, or None if there is none.

        Raises
        ------
        DataError
            The file is damaged, or it is not this block of this run.
        """
        path = self.block_path(index)
        if path is None or not path.exists():
            return None
        block = PrunedBlock()
        with _damage(path):
            _check_content(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                if (metadata[INDEX], metadata[RUN]) != (str(index), self.run):
                    message = "it is another block, or a block of another run"
                    raise ValueError(message)
                block.records = read_records(metadata[RECORDS].encode())
                for key in file.keys():  # noqa: SIM118 - safetensors files are not mappings
                    if key.startswith(WEIGHT):
                        name, weight = key.removeprefix(WEIGHT), file.get_tensor(key)
                        packed = file.get_tensor(MASK + name)
                        block.weights[name] = weight
                        block.masks[name] = unpack_mask(packed, weight.shape)
                    elif key.startswith(BIAS):
                        block.biases[key.removeprefix(BIAS)] = file.get_tensor(key)
            _check_tensors(block)
        return block

    def read_tensor(self, kind: str, index: int, linear: str) -> Tensor:
        """Read one weight or mask (``WEIGHT``, ``MASK``) of a finished block."""
        path = self.block_path(index)
        if path is None:
            message = f"{self.blocks} lacks block {index}; start the run again"
            raise DataError(message)
        with _damage(path), safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(kind + linear)
            if kind != MASK:
                return tensor
            return unpack_mask(tensor, file.get_slice(WEIGHT + linear).get_shape())


def write_block(folder: Path, index: int, block: PrunedBlock, run: str) -> str:
    """Store a finished block in a folder; return the name of the file.

    The name has the hash of the content. Two processes that prune the same block write
    files that differ only in their seconds.

    Parameters
    ----------
    folder, index, block
        The folder, the index of the block, and the block.
    run
        Key of the run.
    """
    tensors = {WEIGHT + name: weight for name, weight in block.weights.items()}
    tensors |= {MASK + name: pack_mask(mask) for name, mask in block.masks.items()}
    tensors |= {BIAS + name: bias for name, bias in block.biases.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {RECORDS: record_lines(block.records), INDEX: str(index), RUN: run}
    content = save(tensors, metadata=metadata)
    name = f"{index:05d}-{bytes_sha256(content)[:DIGITS]}.safetensors"
    atomic_write(folder / name, content)
    return name


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn the errors of reading a block into one that says how to go on."""
    try:
        yield
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, DataError) as error:
        message = (
            f"{path} is damaged ({one_line(error)}); delete it to redo that block, or "
            f"start over with --no-resume (resume=False)"
        )
        raise DataError(message) from error


def _check_content(path: Path) -> None:
    """Raise unless the content of a block file has the hash in its name."""
    if file_sha256(path)[:DIGITS] != path.stem.rpartition("-")[2]:
        message = "its content changed"
        raise ValueError(message)


def _check_tensors(block: PrunedBlock) -> None:
    """Raise unless weights are finite, and zero where their masks say so."""
    for name, weight in block.weights.items():
        if not bool(torch.isfinite(weight).all()):
            message = f"{name} is not finite"
            raise ValueError(message)
        if bool((weight[~block.masks[name]] != 0).any()):
            message = f"{name} is not zero where its mask says so"
            raise ValueError(message)

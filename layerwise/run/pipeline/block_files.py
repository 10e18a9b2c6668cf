"""Finished blocks as files: stored weights, bit-packed masks, and figures in the header.

A block and its figures appear together or not at all. The name of the file contains the
hash of its content.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import DataError
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.bitmask import pack_mask, unpack_mask
from layerwise.run.checkpoints.hashes import bytes_sha256, file_sha256
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import PrunedBlock

WEIGHT, MASK, BIAS = "weight:", "mask:", "bias:"
DIGITS = 16  # of the hash of the content, in the name of a file


class BlockFolder:
    """Reads the finished blocks of a folder.

    Parameters
    ----------
    blocks
        The folder.
    """

    def __init__(self, blocks: Path) -> None:
        self.blocks = blocks

    def block_path(self, index: int) -> Path | None:
        """File of a finished block, or None if there is none."""
        return next(iter(sorted(self.blocks.glob(f"{index:05d}-*.safetensors"))), None)

    def read_block(self, index: int) -> PrunedBlock | None:
        """Return a finished block, or None if there is none.

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
                for key in file.keys():  # noqa: SIM118 - safetensors files are not mappings
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

    def read_tensor(self, kind: str, index: int, linear: str) -> Tensor:
        """Read one weight or mask (``WEIGHT``, ``MASK``) of a finished block."""
        path = self.block_path(index)
        if path is None:
            message = f"{self.blocks} lacks block {index}; start the run again"
            raise DataError(message)
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(kind + linear)
                if kind != MASK:
                    return tensor
                return unpack_mask(tensor, file.get_slice(WEIGHT + linear).get_shape())
        except (SafetensorError, OSError) as error:
            message = f"{path} is damaged ({error}); delete it to redo that block"
            raise DataError(message) from error


def write_block(folder: Path, index: int, block: PrunedBlock) -> None:
    """Store a finished block in a folder, under a name with the hash of its content.

    Two processes that prune the same block write files that differ only in their seconds.
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
    """Raise unless the content of a block file has the hash in its name."""
    if file_sha256(path)[:DIGITS] != path.stem.rpartition("-")[2]:
        message = f"{path} is damaged: its content changed; delete it to redo that block"
        raise DataError(message)

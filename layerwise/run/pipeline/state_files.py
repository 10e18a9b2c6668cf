"""States of a training as files: tensors, and a text in the header.

A state names its run, itself, and the hash of its tensors and text. So one that was
damaged, renamed or taken from another run is not continued.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import DataError, one_line
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.files import check_regular
from layerwise.run.checkpoints.hashes import tensor_hashes

TEXT, NAME, RUN, HASH = "text", "name", "run", "sha256"


def write_state(path: Path, run: str, tensors: Mapping[str, Tensor], text: str) -> None:
    """Store tensors and text, atomically; `run` is the key of the run."""
    ready = {key: tensor.contiguous() for key, tensor in tensors.items()}
    metadata = {TEXT: text, NAME: path.name, RUN: run, HASH: _hash(ready, text)}
    atomic_write(path, save(ready, metadata=metadata))


def read_state(path: Path, run: str) -> tuple[dict[str, Tensor], str] | None:
    """Return tensors and text of a state, or None if there is none.

    Raises
    ------
    DataError
        The file is damaged, or it is not this state of this run.
    """
    if not path.exists():
        return None
    try:
        with safe_open(check_regular(path), framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        text = metadata[TEXT]
        if (metadata[NAME], metadata[RUN]) != (path.name, run):
            message = "it is another state, or a state of another run"
            raise ValueError(message)
        if metadata[HASH] != _hash(tensors, text):
            message = "its content changed"
            raise ValueError(message)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, DataError) as error:
        message = (
            f"{path} is damaged ({one_line(error)}); delete it to redo that part, or start "
            f"over with --no-resume (resume=False)"
        )
        raise DataError(message) from error
    return tensors, text


def _hash(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensor_hashes(tensors.items()).items()):
        digest.update(f"{name} {value}".encode())
    return digest.hexdigest()

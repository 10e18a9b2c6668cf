"""SHA-256 of files, of tensors, and of models."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import DataError, one_line
from layerwise.run.checkpoints.files import open_regular
from layerwise.run.steps import counted


def bytes_sha256(content: bytes) -> str:
    """Hash of bytes in memory."""
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of the bytes of a file."""
    try:
        with open_regular(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        message = f"cannot read {path}: {one_line(error)}"
        raise DataError(message) from error


def tensor_hashes(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Hash of the bytes of every tensor, by name."""
    return {name: bytes_sha256(_bytes_of(tensor)) for name, tensor in tensors}


def digests(model: nn.Module) -> dict[str, str]:
    """Hash of the bytes of every parameter and buffer that a model stores, by name."""
    return tensor_hashes(model.state_dict().items())


def parameters_sha256(model: nn.Module | None) -> str:
    """Hash of all parameters with their names; without a model, that of nothing."""
    parameters = {} if model is None else dict(model.named_parameters())
    digest, count = hashlib.sha256(), len(parameters)
    ordered = sorted(parameters.items())
    for name, parameter in counted(ordered, count, f"hashing {count} parameters"):
        digest.update(name.encode())
        digest.update(_bytes_of(parameter))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """Bytes of a tensor, as a file holds them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

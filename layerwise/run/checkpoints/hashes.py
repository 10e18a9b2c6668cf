"""SHA-256 of tensors and models."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.run.checkpoints.storage import Checkpoint


def digests(model: nn.Module) -> dict[str, str]:
    """Hash of the bytes of every tensor of a model, by name."""
    return {
        name: hashlib.sha256(bytes_of(tensor.detach().cpu())).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def bytes_of(tensor: Tensor) -> Any:
    """Bytes of a tensor on the CPU, as they are stored in a file."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def tensor_hashes(checkpoint: Checkpoint, names: set[str]) -> dict[str, str]:
    """Hash of the bytes of some tensors."""
    return {
        name: hashlib.sha256(bytes_of(tensor)).hexdigest()
        for name, tensor in checkpoint.tensors(sorted(names))
    }


def _parameters_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(bytes_of(parameter.detach().cpu()))
    return digest.hexdigest()

"""The one entry for opening a model folder, whatever its format."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.loading import load_stock
from layerwise.run.models.native_type import is_native

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load(
    name_or_path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Open a model that layerwise wrote, or any causal language model of transformers.

    Parameters
    ----------
    name_or_path
        A folder in the stock or the native format, or a name on the hub.
    device
        Where the model goes.

    Returns
    -------
    PreTrainedModel
        The model in evaluation mode, every tensor accounted for.

    Raises
    ------
    DataError
        The folder is missing, damaged or hostile.
    UnsupportedModelError
        The architecture is unknown, or would need code from the folder.
    """
    return load_model(Checkpoint.open(name_or_path), device)


def load_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Model of a checkpoint in the stock or the native format, see :func:`load`."""
    if is_native(checkpoint.config):
        from layerwise.run.models.native import load_native  # checks with pydantic

        return load_native(checkpoint, device)
    return load_stock(checkpoint, device)

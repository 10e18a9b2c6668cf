"""Opening of a model: an object, a folder in any format, or a name on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from layerwise.adapters import Adapter
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.architecture import adapter_of, as_stored, is_declared
from layerwise.run.models.loading import load_stock
from layerwise.run.models.native_type import is_native
from layerwise.run.models.objects import check_object
from layerwise.run.models.residency import InMemory, Residency, Streamed
from layerwise.run.models.stored_types import read_stored_weights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class OpenedModel:
    """A model that a run works on; make one with :func:`open_model`.

    Parameters
    ----------
    residency
        Location of its parameters.
    adapter
        Declaration of its architecture.
    source
        The checkpoint that it was opened from; None for a model object.
    """

    residency: Residency
    adapter: Adapter
    source: Checkpoint | None = None

    @property
    def model(self) -> Any:
        """The model; a streamed one has the parameters of one block at a time."""
        return self.residency.model

    @cached_property
    def stored_weights(self) -> Mapping[str, Tensor]:
        """Weights, (out, in), whose type in the files is not that of the model, by linear.

        Each is read when it is used.
        """
        if self.source is None:
            return {}
        return read_stored_weights(self.source, self.model, self.adapter)

    @property
    def in_memory(self) -> bool:
        """Whether all parameters are in memory."""
        return isinstance(self.residency, InMemory)


def open_model(
    model_or_path: nn.Module | Checkpoint | str | Path,
    *,
    streamed: bool,
    trusted: bool = False,
) -> OpenedModel:
    """Open a model object, a checkpoint folder or a model of the hub.

    Parameters
    ----------
    model_or_path
        A model object, a folder or hub name, or a checkpoint that is open already.
    streamed
        Whether to have one block at a time in memory, if the checkpoint allows it.
    trusted
        Whether the tensors have been checked already.

    Raises
    ------
    DataError, UnsupportedModelError
        As :func:`load`, and of a model object as
        :func:`~layerwise.run.models.objects.check_object`.
    """
    if isinstance(model_or_path, nn.Module):
        check_object(model_or_path)
        return OpenedModel(InMemory(model_or_path), adapter_of(model_or_path))
    source = model_or_path
    if not isinstance(source, Checkpoint):
        source = Checkpoint.open(source)
    opened = Streamed.open(source, trusted=trusted) if streamed else None
    residency = InMemory(load_model(source)) if opened is None else opened
    adapter = as_stored(_adapter_in(residency), residency.model, source)
    return OpenedModel(residency, adapter, source)


def _adapter_in(residency: Residency) -> Adapter:
    """Adapter of a model, which is loaded only if it must be run to find the adapter."""
    if is_declared(residency.model):
        return adapter_of(residency.model)
    with residency.whole():
        return adapter_of(residency.model)


def load(
    name_or_path: str | os.PathLike[str], *, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Open a model that layerwise wrote, or any causal language model of transformers.

    Parameters
    ----------
    name_or_path
        A folder in the stock or the native format, or a name on the hub.
    device
        Device of the model.

    Returns
    -------
    PreTrainedModel
        The model in evaluation mode, every tensor accounted for.

    Raises
    ------
    DataError
        The folder is missing, damaged or unsafe.
    UnsupportedModelError
        The architecture is unknown, or would need code from the folder.
    """
    return load_model(Checkpoint.open(name_or_path), device)


def load_model(
    checkpoint: Checkpoint, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a checkpoint in the stock or the native format, see :func:`load`."""
    if is_native(checkpoint.config):
        from layerwise.run.models.native import load_native  # checks with pydantic

        return load_native(checkpoint, device)
    return load_stock(checkpoint, device)

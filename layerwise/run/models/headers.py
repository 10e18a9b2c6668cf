"""Structure, types and sizes of a checkpoint, without its weights."""

from dataclasses import dataclass
from typing import Any

import torch

from layerwise.run.checkpoints.shard import FLOATS
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.accounts import account_of
from layerwise.run.models.loading import quiet_transformers
from layerwise.run.models.native_type import is_native
from layerwise.run.models.skeleton import read_config, skeleton_of


@dataclass(frozen=True, eq=False)
class Headers:
    """Model of a checkpoint without its parameters.

    Parameters
    ----------
    model
        The model, with parameters on the meta device, in the type that a run gives them.
    one_to_one
        Whether every parameter is stored as one tensor, so that a run can load one block
        at a time.
    """

    model: Any
    one_to_one: bool

    @classmethod
    def read(cls, checkpoint: Checkpoint) -> "Headers":
        """Read the structure of a checkpoint; its headers must fit its configuration.

        Raises
        ------
        DataError, UnsupportedModelError
            As :func:`layerwise.run.models.opening.load_model`, for all defects that are
            visible without weights.
        """
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            operate = None
            if is_native(checkpoint.config):
                from layerwise.run.models.native import read_native  # needs pydantic

                config, operate = read_native(checkpoint)
            else:
                config = read_config(checkpoint)
            dtype = type_of_all(checkpoint, config)
            streams = operate is None and dtype is not None
            dtype = dtype or _most_stored(checkpoint)
            model = skeleton_of(checkpoint, config, operate, dtype=dtype)
        streams = is_one_to_one(checkpoint, model) and streams
        return cls(model, streams)


def type_of_all(checkpoint: Checkpoint, config: Any) -> torch.dtype | None:
    """Type of all parameters; None if transformers must choose."""
    if config.dtype is not None:
        dtype: torch.dtype = config.dtype
        return dtype
    kinds = {entry.dtype for entry in checkpoint.entries().values()}
    return FLOATS.get(kinds.pop()) if len(kinds) == 1 else None


def _most_stored(checkpoint: Checkpoint) -> torch.dtype:
    """Type of the largest part of the stored bytes."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.entries().values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.n_bytes
    floats = {name: size for name, size in sizes.items() if name in FLOATS}
    return FLOATS[max(floats, key=floats.__getitem__)] if floats else torch.float32


def is_one_to_one(checkpoint: Checkpoint, model: Any) -> bool:
    """Whether every parameter is stored as one tensor, in the type of the model."""
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        if getattr(model, name, None):  # some modules keep another type
            return False
    return account_of(model, checkpoint).is_one_to_one

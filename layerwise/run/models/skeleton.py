"""A model without its parameters: the structure described by ``config.json``.

Parameters are on the meta device and take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerwise.errors import DataError, UnsupportedModelError, one_line
from layerwise.run.checkpoints.plain_config import is_plain
from layerwise.run.checkpoints.shard import FLOATS
from layerwise.run.checkpoints.storage import checkpoint_names

if TYPE_CHECKING:
    from layerwise.run.checkpoints.storage import Checkpoint

NAMES_SHOWN = 3
SHOWN = 40  # characters of a value of config.json in a message
LARGE_BUFFERS = 1 << 30  # bytes


def read_config(checkpoint: Checkpoint) -> Any:
    """Parse the configuration of an architecture that is part of transformers."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    model_type = checkpoint.config["model_type"]
    shown = repr(model_type[:SHOWN])
    if model_type not in CONFIG_MAPPING:
        reason = "this version of transformers does not know it"
        if "auto_map" in checkpoint.config:
            reason = "it needs code from the checkpoint (auto_map), which is never run"
        message = f"model type {shown} in {checkpoint.path}: {reason}"
        raise UnsupportedModelError(message)
    try:
        with _readable(checkpoint) as folder:
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        message = f"{checkpoint.path / 'config.json'} is invalid: {one_line(error)}"
        raise DataError(message) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        message = (
            f"model type {shown} in {checkpoint.path} is not a causal language "
            f"model: choose a text-generation checkpoint"
        )
        raise UnsupportedModelError(message)
    return config


@contextmanager
def _readable(checkpoint: Checkpoint) -> Iterator[Path]:
    """Folder with a config.json that transformers can read."""
    if is_plain(checkpoint.config):
        yield checkpoint.path
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_bytes(checkpoint.side_file("config.json"))
        yield folder


def skeleton_of(
    checkpoint: Checkpoint,
    config: Any,
    operate: Callable[[nn.Module], object] | None = None,
    dtype: torch.dtype | None = None,
    *,
    buffers: bool = False,
) -> Any:
    """Build the model of a checkpoint without parameters, after a check of all shapes.

    Parameters
    ----------
    checkpoint, config
        The headers, and the parsed configuration.
    operate
        Function that gives a model of that configuration the stored parameters.
    dtype
        Type of the parameters; by default that of the configuration.
    buffers
        Whether buffers have values on the CPU; they are small and mostly computed instead
        of stored (rotary frequencies).

    Raises
    ------
    DataError
        The configuration is invalid, or a tensor has another shape than it describes.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not 0 < layers <= len(checkpoint.weight_map):
        message = (
            f"{checkpoint.path / 'config.json'} asks for {layers} layers but the "
            f"checkpoint holds {len(checkpoint.weight_map)} tensors: fix the number"
        )
        raise DataError(message)
    # first without memory: a damaged configuration may describe any size
    model = _build(checkpoint, config, dtype)
    if operate is not None:
        operate(model)
    _check_shapes(checkpoint, model)
    _check_buffers(checkpoint, model)
    if buffers:
        _compute_buffers(model)
    return model.eval()


def _build(checkpoint: Checkpoint, config: Any, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    given = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):  # for this thread alone
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **given
            )
    except Exception as error:
        message = f"{checkpoint.path / 'config.json'} is invalid: {one_line(error)}"
        raise DataError(message) from error


def _compute_buffers(model: Any) -> None:
    """Give the buffers of a model on meta their values, as transformers does in loading."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers leaves these as they are
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    model.initialize_weights()


def _check_shapes(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Compare types and shapes with the headers, before weights take any memory."""
    entries = checkpoint.entries()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in checkpoint_names(model, checkpoint).items():
        kind = entries[stored].dtype
        if kind not in FLOATS and parameters[name].is_floating_point():
            message = (
                f"tensor {stored!r} of {checkpoint.path} is stored as {kind}, a parameter "
                f"must be {', '.join(FLOATS)}: take the checkpoint before its quantisation "
                f"or conversion"
            )
            raise UnsupportedModelError(message)
        expected, shape = tuple(parameters[name].shape), entries[stored].shape
        if expected != shape:
            message = (
                f"tensor {stored!r} of {checkpoint.path} has shape {shape}, its "
                f"config.json asks for {expected}: restore the one that is wrong"
            )
            raise DataError(message)


def _check_buffers(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse computed tables that are larger than the model: no tensor tells their size."""
    needed = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    stored = sum(entry.n_bytes for entry in checkpoint.entries().values())
    if needed > max(LARGE_BUFFERS, stored):
        message = (
            f"{checkpoint.path / 'config.json'} asks for tables of {needed:,} bytes beside "
            f"weights of {stored:,}: correct its number of positions"
        )
        raise DataError(message)


def refuse_mismatch(checkpoint: Checkpoint, problem: str, names: set[str]) -> None:
    """Raise an error that lists some of the names, if there are any."""
    if names:
        shown = ", ".join(sorted(names)[:NAMES_SHOWN])
        more = f" and {len(names) - NAMES_SHOWN} more" * (len(names) > NAMES_SHOWN)
        message = (
            f"{checkpoint.path} {problem}: {shown}{more}; config.json does not fit the "
            f"weights, or the download is incomplete: download it again"
        )
        raise DataError(message)

"""A model without its parameters: the structure described by ``config.json``.

Parameters are on the meta device and take no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerwise.errors import DataError, UnsupportedModelError, one_line
from layerwise.run.checkpoints.plain_config import is_plain
from layerwise.run.checkpoints.shard import FLOATS
from layerwise.run.models.accounts import Account, account_of, listed, refuse_mismatch
from layerwise.run.models.flags import flags_for
from layerwise.run.models.kinds import auto_class_of, refuse_other_kinds

if TYPE_CHECKING:
    from layerwise.run.checkpoints.storage import Checkpoint

SHOWN = 40  # characters of a value of config.json in a message
LARGE_BUFFERS = 1 << 30  # bytes


def read_config(checkpoint: Checkpoint) -> Any:
    """Parse the configuration of an architecture that is part of transformers."""
    from transformers import CONFIG_MAPPING, AutoConfig

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
    refuse_other_kinds(checkpoint, config)
    _check_generation(checkpoint)
    return config


@contextmanager
def _readable(checkpoint: Checkpoint) -> Iterator[Path]:
    """Folder with a config.json that transformers can read."""
    if is_plain(checkpoint.config):
        yield checkpoint.path
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint.copy_side_file("config.json", folder)
        yield folder


def _check_generation(checkpoint: Checkpoint) -> None:
    """Refuse settings of generation with which transformers does not open a model."""
    from transformers import GenerationConfig

    name = "generation_config.json"
    if name not in checkpoint.side_files():
        return
    try:
        GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except OSError:  # transformers takes its defaults
        return
    except Exception as error:
        message = (
            f"transformers cannot use {checkpoint.path / name} ({one_line(error)}): "
            f"correct it, or remove it"
        )
        raise DataError(message) from error


def skeleton_of(
    checkpoint: Checkpoint,
    config: Any,
    operate: Callable[[nn.Module], object] | None = None,
    dtype: torch.dtype | None = None,
    *,
    buffers: bool = False,
) -> Any:
    """Build the model of a checkpoint without parameters, after a check of all tensors.

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
        The configuration is invalid, a tensor has another shape than it describes, is
        missing, or has no place in the model.
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
    _check_tensors(checkpoint, config, model)
    _check_buffers(checkpoint, model)
    if buffers:
        _compute_buffers(model)
    return model.eval()


def _build(checkpoint: Checkpoint, config: Any, dtype: torch.dtype | None) -> Any:
    given = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):  # for this thread alone
            return auto_class_of(config).from_config(
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


def _check_tensors(checkpoint: Checkpoint, config: Any, model: nn.Module) -> None:
    """Compare the configuration with the headers, before weights take any memory."""
    account = account_of(model, checkpoint)
    _check_shapes(checkpoint, model, account)
    surplus = {name for name in account.unplaced if _is_of_more_layers(model, name)}
    refuse_mismatch(checkpoint, "lacks tensors of the model", account.missing)
    refuse_mismatch(checkpoint, "stores tensors twice, by two names", account.doubled)
    refuse_mismatch(checkpoint, "has layers that config.json does not count", surplus)
    if account.unplaced:
        cure = _cure(checkpoint, config, account.unplaced)
        message = (
            f"{checkpoint.path} has tensors for which its config.json has no place: "
            f"{listed(account.unplaced)}; {cure}, or remove the tensors from the files"
        )
        raise DataError(message)


def _cure(checkpoint: Checkpoint, config: Any, unplaced: Collection[str]) -> str:
    """What to change in a configuration that has no place for tensors."""
    build = partial(_build, checkpoint, dtype=None)
    flags, besides = flags_for(config, build, unplaced)
    if not flags:
        return "correct config.json"
    also = f", which also asks for {listed(besides)}" if besides else ""
    return f"set {' and '.join(flags)} to true there{also}"


def _check_shapes(checkpoint: Checkpoint, model: nn.Module, account: Account) -> None:
    """Compare types and shapes with the headers, before weights take any memory."""
    entries = checkpoint.entries()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in account.names.items():
        if name not in parameters:
            continue
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


def _is_of_more_layers(model: nn.Module, name: str) -> bool:
    """Whether a model with more layers would have a tensor."""
    expected = {_family(known) for known in model.state_dict()}
    return _family(name) in expected


def _family(name: str) -> str:
    """Name without the numbers of layers and experts."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)

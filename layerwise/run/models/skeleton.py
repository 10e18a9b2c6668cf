"""A model without its parameters: the structure described by ``config.json``.

Parameters are on the meta device and take no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerwise.errors import DataError, UnsupportedModelError, one_line
from layerwise.run.checkpoints.storage import checkpoint_names

if TYPE_CHECKING:
    from layerwise.run.checkpoints.storage import Checkpoint

NAMES_SHOWN = 3


def read_config(checkpoint: Checkpoint) -> Any:
    """Parse the configuration of an architecture that is part of transformers."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    model_type = checkpoint.config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        reason = "this version of transformers does not know it"
        if "auto_map" in checkpoint.config:
            reason = "it needs code from the checkpoint (auto_map), which is never run"
        message = f"model type {model_type!r} in {checkpoint.path}: {reason}"
        raise UnsupportedModelError(message)
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        message = f"{checkpoint.path / 'config.json'} is invalid: {one_line(error)}"
        raise DataError(message) from error
    _check_generation(checkpoint)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        message = (
            f"model type {model_type!r} in {checkpoint.path} is not a causal language "
            f"model: choose a text-generation checkpoint"
        )
        raise UnsupportedModelError(message)
    return config


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
        Whether buffers have values; they are small and mostly computed instead of stored
        (rotary frequencies).

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
    model = _build(checkpoint, config, torch.device("meta"), dtype)
    if operate is not None:
        operate(model)
    _check_shapes(checkpoint, model)
    if buffers:
        model = _build(checkpoint, config, _parameters_on_meta(), dtype)
    return model.eval()


def _build(
    checkpoint: Checkpoint,
    config: Any,
    device: AbstractContextManager[Any],
    dtype: torch.dtype | None,
) -> Any:
    from transformers import AutoModelForCausalLM

    given = {} if dtype is None else {"dtype": dtype}
    try:
        with device:
            return AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **given
            )
    except Exception as error:
        message = f"{checkpoint.path / 'config.json'} is invalid: {one_line(error)}"
        raise DataError(message) from error


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter to the meta device as soon as a module registers it."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            empty = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        original(self, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _check_shapes(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Compare the configuration with the headers, before weights take any memory."""
    entries = checkpoint.entries()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in checkpoint_names(model, checkpoint).items():
        expected, shape = tuple(parameters[name].shape), entries[stored].shape
        if expected != shape:
            message = (
                f"tensor {stored!r} of {checkpoint.path} has shape {shape}, its "
                f"config.json asks for {expected}: restore the one that is wrong"
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

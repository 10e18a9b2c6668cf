"""A model without its parameters: the structure described by ``config.json``.

Parameters are on the meta device and take no memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from layerwise.errors import DataError, UnsupportedModelError, one_line
from layerwise.run.models.accounts import Account, account_of, listed, refuse_mismatch
from layerwise.run.models.flags import flags_for
from layerwise.run.models.kinds import auto_class_of, refuse_other_kinds

if TYPE_CHECKING:
    from layerwise.run.checkpoints.storage import Checkpoint


def read_config(checkpoint: Checkpoint) -> Any:
    """Parse the configuration of an architecture that is part of transformers."""
    from transformers import CONFIG_MAPPING, AutoConfig

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
    refuse_other_kinds(checkpoint, config)
    return config


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
        Whether buffers have values; they are small and mostly computed instead of stored
        (rotary frequencies).

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
    model = _build(checkpoint, config, torch.device("meta"), dtype)
    if operate is not None:
        operate(model)
    _check_tensors(checkpoint, config, model)
    if buffers:
        model = _build(checkpoint, config, _parameters_on_meta(), dtype)
    return model.eval()


def _build(
    checkpoint: Checkpoint,
    config: Any,
    device: AbstractContextManager[Any],
    dtype: torch.dtype | None,
) -> Any:
    given = {} if dtype is None else {"dtype": dtype}
    try:
        with device:
            return auto_class_of(config).from_config(
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
    build = partial(_build, checkpoint, device=torch.device("meta"), dtype=None)
    flags, besides = flags_for(config, build, unplaced)
    if not flags:
        return "correct config.json"
    also = f", which also asks for {listed(besides)}" if besides else ""
    return f"set {' and '.join(flags)} to true there{also}"


def _check_shapes(checkpoint: Checkpoint, model: nn.Module, account: Account) -> None:
    entries = checkpoint.entries()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, stored in account.names.items():
        if name not in parameters:
            continue
        expected, shape = tuple(parameters[name].shape), entries[stored].shape
        if expected != shape:
            message = (
                f"tensor {stored!r} of {checkpoint.path} has shape {shape}, its "
                f"config.json asks for {expected}: restore the one that is wrong"
            )
            raise DataError(message)


def _is_of_more_layers(model: nn.Module, name: str) -> bool:
    """Whether a model with more layers would have a tensor."""
    expected = {_family(known) for known in model.state_dict()}
    return _family(name) in expected


def _family(name: str) -> str:
    """Name without the numbers of layers and experts."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)

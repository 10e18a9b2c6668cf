"""From a validated checkpoint to a model: everything transformers would forgive.

The library fills tensors that are missing with random numbers, drops those it has no
place for, and accepts NaN. Here each of these is an error that names the tensor. Code
that comes with a checkpoint is never executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import DataError, UnsupportedModelError
from layerwise.run.quoting import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from layerwise.run.storage import Checkpoint

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
NAMES_SHOWN = 3


def load_model(checkpoint: Checkpoint, device: torch.device | str) -> PreTrainedModel:
    """Model of a checkpoint in evaluation mode, its own type, every tensor accounted.

    Raises
    ------
    UnsupportedModelError
        The architecture is unknown, no causal language model, or needs its own code.
    DataError
        A tensor is missing, has another shape than the configuration says, belongs to
        a layer the configuration does not have, or is not finite.
    """
    with quiet_transformers():
        config = _read_config(checkpoint)
    return load_as(checkpoint, config, device)


def load_as(
    checkpoint: Checkpoint,
    config: Any,
    device: torch.device | str,
    operate: Callable[[nn.Module], object] | None = None,
) -> PreTrainedModel:
    """Model of a checkpoint and a configuration, see :func:`load_model`.

    Parameters
    ----------
    checkpoint, config, device
        The tensors, the parsed configuration, and where the model goes.
    operate
        What gives a model of that configuration, before its tensors are loaded, the
        parameters that the checkpoint holds.
    """
    # random numbers for missing tensors must not come from the caller's generator
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        _check_shapes(checkpoint, config, operate)
        model = _instantiate(checkpoint, config, operate)
    _check_finite(model, checkpoint)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """Tokenizer of a checkpoint, or None where the folder has no tokenizer files.

    Raises
    ------
    DataError
        The files are damaged, or the tokenizer needs code of its own.
    """
    from transformers import AutoTokenizer

    if not any((checkpoint.path / name).is_file() for name in TOKENIZER_FILES):
        return None
    with quiet_transformers():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                checkpoint.path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            message = (
                f"the tokenizer in {checkpoint.path} cannot be loaded: "
                f"{one_line(error)}; restore its files or pass token ids instead"
            )
            raise DataError(message) from error
    return tokenizer


def checkpoint_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Where each parameter of a model is stored: parameter name -> tensor name.

    Names agree, or differ by the prefix of the base model (``model.``) that some
    checkpoints omit. Parameters that are tied share the tensor that is stored.

    Returns
    -------
    dict
        One entry per parameter name, tied ones included. Parameters without a tensor
        of their own (such as those that transformers fuses while loading) are absent.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stored = checkpoint.weight_map
    names: dict[str, str] = {}
    first: dict[int, str] = {}  # identity of a parameter -> tensor name
    parameters = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in stored:
                names[name] = candidate
                first.setdefault(id(parameter), candidate)
                break
    for name, parameter in parameters:
        if name not in names and id(parameter) in first:
            names[name] = first[id(parameter)]
    return names


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence warnings and progress bars of transformers inside the block only."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
    )
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
            if not hub_bars:  # the line above has switched them on as well
                disable_progress_bars()


def _read_config(checkpoint: Checkpoint) -> Any:
    """Parse the configuration of an architecture that transformers has itself."""
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
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        message = (
            f"model type {model_type!r} in {checkpoint.path} is not a causal language "
            f"model: choose a text-generation checkpoint"
        )
        raise UnsupportedModelError(message)
    return config


def _check_shapes(
    checkpoint: Checkpoint, config: Any, operate: Callable[[nn.Module], object] | None
) -> None:
    """Compare configuration and headers before any memory is spent on weights."""
    from transformers import AutoModelForCausalLM

    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not 0 < layers <= len(checkpoint.weight_map):
        message = (
            f"{checkpoint.path / 'config.json'} asks for {layers} layers but the "
            f"checkpoint holds {len(checkpoint.weight_map)} tensors: fix the number"
        )
        raise DataError(message)
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        message = f"{checkpoint.path / 'config.json'} is invalid: {one_line(error)}"
        raise DataError(message) from error
    if operate is not None:
        operate(skeleton)
    entries = checkpoint.entries()
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))
    for name, stored in checkpoint_names(skeleton, checkpoint).items():
        expected, found = tuple(parameters[name].shape), entries[stored].shape
        if expected != found:
            message = (
                f"tensor {stored!r} of {checkpoint.path} has shape {found}, its "
                f"config.json asks for {expected}: the two do not belong together"
            )
            raise DataError(message)


def _instantiate(
    checkpoint: Checkpoint, config: Any, operate: Callable[[nn.Module], object] | None
) -> Any:
    """Load with transformers and judge its loading report."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    own = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    loader: Any = AutoModelForCausalLM
    given = {}
    if operate is not None:
        loader, given = _operated(own, operate), {"config": config}
    try:
        loaded: Any = loader.from_pretrained(
            checkpoint.path,
            **given,
            dtype="auto",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        message = f"{checkpoint.path} cannot be loaded: {one_line(error)}"
        raise DataError(message) from error
    model, report = loaded
    expected = {_family(name) for name in model.state_dict()}
    surplus = {
        name
        for name in report["unexpected_keys"]
        if operate is not None or _family(name) in expected
    }
    problems = {
        "lacks tensors of the model": report["missing_keys"],
        "has tensors of another shape": {key[0] for key in report["mismatched_keys"]},
        "has layers that config.json does not count": surplus,
        "does not load": set(report["error_msgs"]),
    }
    for problem, names in problems.items():
        if names:
            shown = ", ".join(sorted(names)[:NAMES_SHOWN])
            more = f" and {len(names) - NAMES_SHOWN} more" * (len(names) > NAMES_SHOWN)
            message = (
                f"{checkpoint.path} {problem}: {shown}{more}; config.json and the "
                f"weights do not belong together, or the download is incomplete"
            )
            raise DataError(message)
    if operate is not None:
        model.__class__ = own
    return model


def _operated(kind: Any, operate: Callable[[nn.Module], object]) -> Any:
    """Class of models that are operated on as soon as they exist."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        operate(self)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _family(name: str) -> str:
    """Name with the numbers of layers and experts taken out."""
    return re.sub(r"\.\d+(?=\.)", ".*", name)


def _check_finite(model: nn.Module, checkpoint: Checkpoint) -> None:
    stored = checkpoint_names(model, checkpoint)
    for name, tensor in model.state_dict().items():
        if (index := _first_not_finite(tensor)) is not None:
            message = (
                f"tensor {stored.get(name, name)!r} of {checkpoint.path} holds "
                f"{float(tensor[index])} at {list(index)}: the checkpoint is damaged"
            )
            raise DataError(message)


def _first_not_finite(tensor: Tensor) -> tuple[int, ...] | None:
    if not tensor.is_floating_point():
        return None
    values = tensor.float() if tensor.element_size() == 1 else tensor
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return None
    position = int((~finite).reshape(-1).to(torch.uint8).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(position), finite.shape))

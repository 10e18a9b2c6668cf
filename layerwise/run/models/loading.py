"""Loading of a validated checkpoint, strict where transformers is tolerant.

The library fills missing tensors with random numbers, drops those that its configuration
does not know, and accepts NaN. Here each of these is an error that names the tensor. Code
that comes with a checkpoint is never executed.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.chunks import all_finite
from layerwise.errors import DataError, one_line
from layerwise.run.checkpoints.plain_config import is_plain
from layerwise.run.data.tokens import PANIC
from layerwise.run.models.accounts import account_of, refuse_mismatch
from layerwise.run.models.kinds import auto_class_of, class_of
from layerwise.run.models.skeleton import read_config, skeleton_of
from layerwise.run.steps import counted, status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from layerwise.run.checkpoints.storage import Checkpoint

ONE_THREAD = threading.RLock()
SENTENCEPIECE = "sentencepiece"  # a package of its own
PEEK = 4096  # bytes
SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def load_stock(checkpoint: Checkpoint, device: torch.device | str) -> PreTrainedModel:
    """Load a checkpoint in its own type and in evaluation mode; every tensor must fit.

    Raises
    ------
    UnsupportedModelError
        The architecture is unknown, not a causal language model, or needs code of its own.
    DataError
        A tensor is missing, has another shape than the configuration says or no place in
        it, or is not finite.
    """
    with quiet_transformers():
        config = read_config(checkpoint)
    return load_as(checkpoint, config, device)


def load_as(
    checkpoint: Checkpoint,
    config: Any,
    device: torch.device | str,
    operate: Callable[[nn.Module], object] | None = None,
) -> PreTrainedModel:
    """Load the model of a checkpoint with a configuration, see :func:`load_stock`.

    Parameters
    ----------
    checkpoint, config, device
        The tensors, the parsed configuration, and the device of the model.
    operate
        Function that gives a model of that configuration the parameters of the checkpoint,
        before the tensors are loaded.
    """
    # random numbers for missing tensors must not come from the caller's generator
    status(f"loading {checkpoint.path}")
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        skeleton_of(checkpoint, config, operate)
        model = _instantiate(checkpoint, config, operate)
    _check_finite(model, checkpoint)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a checkpoint; None if the folder has no tokenizer files.

    Raises
    ------
    DataError
        The files are damaged, or the tokenizer needs code of its own.
    """
    from transformers import AutoTokenizer

    if not any((checkpoint.path / name).is_file() for name in TOKENIZER_FILES):
        return None
    with quiet_transformers():
        given = {}
        if not is_plain(checkpoint.config):  # transformers would fail to read it
            given["config"] = read_config(checkpoint)
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                checkpoint.path, **given, local_files_only=True, trust_remote_code=False
            )
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != PANIC:
                raise  # an interruption
            message = (
                f"the tokenizer in {checkpoint.path} cannot be loaded: "
                f"{one_line(error)}; restore its files or pass token ids instead"
            )
            if (name := _sentencepiece_file(checkpoint)) and not _has_sentencepiece():
                message = (
                    f"{checkpoint.path / name} is a SentencePiece model: pip install "
                    f"{SENTENCEPIECE}, or pass token ids instead"
                )
            raise DataError(message) from error
    return tokenizer


def _sentencepiece_file(checkpoint: Checkpoint) -> str | None:
    """File of a SentencePiece model, if the tokenizer is nothing else."""
    if (checkpoint.path / "tokenizer.json").is_file():
        return None
    for name in SENTENCEPIECE_FILES:
        path = checkpoint.path / name
        # a list of tokens for tiktoken may have the same name: it is plain text
        if path.is_file() and 0 in path.read_bytes()[:PEEK]:
            return name
    return None


def _has_sentencepiece() -> bool:
    return importlib.util.find_spec(SENTENCEPIECE) is not None


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence warnings and progress bars of transformers inside the context.

    One thread at a time: transformers builds models under a default type of numbers that
    all threads share.
    """
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
    )
    from transformers.utils import logging

    with ONE_THREAD:
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


def _instantiate(
    checkpoint: Checkpoint, config: Any, operate: Callable[[nn.Module], object] | None
) -> Any:
    """Load with transformers, and check its loading report."""
    own = class_of(config)
    loader: Any = auto_class_of(config) if operate is None else _operated(own, operate)
    try:
        loaded: Any = loader.from_pretrained(
            checkpoint.path,
            config=config,
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
    problems = {
        "lacks tensors of the model": report["missing_keys"],
        "has tensors of another shape": {key[0] for key in report["mismatched_keys"]},
        "does not load": set(report["error_msgs"]),
    }
    for problem, names in problems.items():
        refuse_mismatch(checkpoint, problem, names)
    if operate is not None:
        model.__class__ = own
    return model


def _operated(kind: Any, operate: Callable[[nn.Module], object]) -> Any:
    """Class of models on which `operate` is called as soon as they exist."""

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        operate(self)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def _check_finite(model: nn.Module, checkpoint: Checkpoint) -> None:
    stored = account_of(model, checkpoint).names
    tensors, free = model.state_dict(), bounds(model)
    text = f"checking {len(tensors)} tensors"
    for name, tensor in counted(tensors.items(), len(tensors), text):
        check_finite(tensor, stored.get(name, name), checkpoint, is_bound=name in free)


def bounds(model: nn.Module) -> set[str]:
    """Names of buffers of one entry: limits of activations, where infinity is no limit."""
    return {name for name, buffer in model.named_buffers() if buffer.numel() == 1}


def check_finite(
    tensor: Tensor, name: str, checkpoint: Checkpoint, *, is_bound: bool = False
) -> None:
    """Raise a DataError for the first entry of a tensor that is not finite.

    Parameters
    ----------
    tensor, name, checkpoint
        The tensor and where it is stored.
    is_bound
        Whether infinity is allowed, see :func:`bounds`.
    """
    if is_bound and bool(torch.isinf(tensor).all()):
        return
    if (index := _first_not_finite(tensor)) is not None:
        message = (
            f"tensor {name!r} of {checkpoint.path} holds {float(tensor[index])} at "
            f"{list(index)}: the checkpoint is damaged; download it again"
        )
        raise DataError(message)


def _first_not_finite(tensor: Tensor) -> tuple[int, ...] | None:
    if not tensor.is_floating_point():
        return None
    values = tensor.float() if tensor.element_size() == 1 else tensor
    if all_finite(values):
        return None
    finite = torch.isfinite(values)
    position = int((~finite).reshape(-1).to(torch.uint8).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(position), finite.shape))

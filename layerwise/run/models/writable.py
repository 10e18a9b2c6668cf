"""Whether a model object can be written so that transformers reads the same model.

``save_pretrained`` writes what the object holds, and a configuration beside it. The library
later builds the model of that configuration: it fills what the file lacks with random
numbers, and drops what the configuration does not describe. So both are compared before a
run, and not after its last layer.
"""

from collections.abc import Mapping
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from layerwise.errors import UsageError, one_line
from layerwise.run.models.loading import quiet_transformers
from layerwise.run.models.stock import skeleton
from layerwise.run.models.surgery import steps_of

OTHERWISE = "or prune without an output and save the model yourself"


def check_writable(model: Any, tokenizer: Any = None) -> None:
    """Refuse an object, before a run, that its own configuration does not describe.

    Raises
    ------
    UsageError
        With the first tensor that differs, or the reason why a configuration cannot be
        written.
    """
    kind = type(model).__name__
    for thing, name in ((model, f"this {kind}"), (tokenizer, "the tokenizer")):
        if thing is not None and not hasattr(thing, "save_pretrained"):
            message = f"{name} has no save_pretrained: give one that has it, {OTHERWISE}"
            raise UsageError(message)
    if steps_of(model):
        message = (
            f"this {kind} was cut in the native format, which its configuration does not "
            f"describe: give the folder that holds it, {OTHERWISE}"
        )
        raise UsageError(message)
    described = _as_read(model)
    _compare(_shapes(described), _shapes(model))
    _compare_ties(_ties(described), _ties(model))


def _as_read(model: Any) -> nn.Module:
    """Model without memory that the configuration describes once it is written."""
    with TemporaryDirectory() as folder, quiet_transformers():
        try:
            model.config.save_pretrained(folder)
            config = type(model.config).from_pretrained(folder)
            described: nn.Module = skeleton(model, config)
        except Exception as error:
            message = (
                f"config of this {type(model).__name__} is invalid: {one_line(error)}; "
                f"correct model.config, {OTHERWISE}"
            )
            raise UsageError(message) from error
        try:
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
        except Exception as error:
            message = (
                f"{one_line(error)}; correct model.generation_config, which an output holds"
            )
            raise UsageError(message) from error
    return described


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _compare(
    described: Mapping[str, tuple[int, ...]], held: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse other names or shapes than those of the configuration."""
    for name in sorted({*described, *held}):
        expected, shape = described.get(name), held.get(name)
        if expected == shape:
            continue
        problem = f"has shape {shape}, its config describes {expected}"
        if shape is None:
            problem = "is missing in the model, its config describes it"
        elif expected is None:
            problem = "is in the model, but its config does not describe it"
        message = f"{name} {problem}: correct model.config or the model, {OTHERWISE}"
        raise UsageError(message)


def _ties(model: nn.Module) -> dict[str, str]:
    """First name of the tensor of every parameter."""
    first: dict[Any, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        own = (parameter.data_ptr(), parameter.shape, parameter.stride())
        key = id(parameter) if parameter.is_meta or not parameter.numel() else own
        ties[name] = first.setdefault(key, name)
    return ties


def _compare_ties(described: Mapping[str, str], held: Mapping[str, str]) -> None:
    """Refuse tensors that are shared in the model alone, or in its configuration alone."""
    for name, first in held.items():
        apart = described.get(name, name)
        if apart == first:
            continue
        tied = first != name
        other = first if tied else apart
        state, cure = ("two", "True") if tied else ("one", "False")
        message = (
            f"{name} and {other} are {'one tensor' if tied else 'two tensors'}, but for "
            f"the config of the model they are {state}: set model.config."
            f"tie_word_embeddings = {cure}, or give {name} a tensor "
            f"{'of its own' if tied else f'shared with {other}'}"
        )
        raise UsageError(message)

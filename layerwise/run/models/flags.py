"""Flags of ``config.json`` that would give stored biases and norms a place in the model."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import nn

from layerwise.errors import LayerwiseError


def flags_for(
    config: Any, build: Callable[[Any], nn.Module], unplaced: Iterable[str]
) -> list[str]:
    """Flags that are off and would together give every tensor a place.

    Parameters
    ----------
    config
        The parsed configuration.
    build
        Builds the model of a configuration, without memory.
    unplaced
        Stored tensors without a place.

    Returns
    -------
    list of str
        Names of the flags; empty if no flags place all of the tensors.
    """
    open_names, found = set(unplaced), []
    for flag in _switched_off(config):
        other = deepcopy(config)
        setattr(other.get_text_config(), flag, True)
        try:
            names = set(build(other).state_dict())
        except LayerwiseError:  # the flag does not fit the rest of the configuration
            continue
        if open_names & names:
            found.append(flag)
            open_names -= names
        if not open_names:
            return found
    return []


def _switched_off(config: Any) -> list[str]:
    """Flags of biases and norms that are false."""
    values = config.get_text_config().to_dict()
    about = {name for name in values if "bias" in name or "norm" in name}
    return [name for name, value in values.items() if value is False and name in about]

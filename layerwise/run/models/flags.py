"""Flags of ``config.json`` that would give stored biases and norms a place in the model."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import nn

from layerwise.errors import LayerwiseError


def flags_for(
    config: Any, build: Callable[[Any], nn.Module], unplaced: Iterable[str]
) -> tuple[list[str], set[str]]:
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
    tuple
        Names of the flags, and the tensors that they would ask for besides; no flags if
        none place all of the tensors.
    """
    unplaced = set(unplaced)
    before, found, asked = set(build(config).state_dict()), [], set[str]()
    for flag in _switched_off(config):
        other = deepcopy(config)
        setattr(other.get_text_config(), flag, True)
        try:
            names = set(build(other).state_dict()) - before
        except LayerwiseError:  # the flag does not fit the rest of the configuration
            continue
        if names & unplaced - asked:
            found.append(flag)
            asked |= names
    return (found, asked - unplaced) if unplaced <= asked else ([], set())


def _switched_off(config: Any) -> list[str]:
    """Flags of biases and norms that are false."""
    values = config.get_text_config().to_dict()
    about = {name for name in values if "bias" in name or "norm" in name}
    return [name for name, value in values.items() if value is False and name in about]

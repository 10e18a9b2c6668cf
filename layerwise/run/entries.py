"""Entries of ``targets`` and ``ignore``: how a user names layers.

An entry is a class name, an exact module name, or ``re:`` and a regular expression that
must match from the start of the module name. ``Linear`` stands for every linear layer,
those that transformers stores transposed (``Conv1D``) and subclasses included.
"""

import re

from torch import nn

from layerwise.adapters.linear import is_linear
from layerwise.errors import UsageError

ANY_LINEAR = "Linear"


def matches(entry: str, name: str, module: nn.Module) -> bool:
    """Whether an entry means a module."""
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], name) is not None
        except re.error as error:
            message = f"{entry!r} is no regular expression: {error}"
            raise UsageError(message) from None
    any_linear = entry == ANY_LINEAR and is_linear(module)
    return entry in (name, type(module).__name__) or any_linear

"""The state of a training as tensors and text, for a file format that cannot run code.

The state of an optimizer is a tree of mappings, lists, numbers and tensors. The text is
this tree in JSON, where every tensor is replaced by its name.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from layerwise.errors import DataError, one_line
from layerwise.recovery.training import State

TENSOR, ITEMS = "tensor", "items"


def pack(state: State) -> tuple[dict[str, Tensor], str]:
    """Tensors by name, and the text with their positions."""
    tensors: dict[str, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = f"{len(tensors):05d}"
            tensors[name] = value.detach().cpu().clone()
            return {TENSOR: name}
        if isinstance(value, Mapping):
            return {ITEMS: [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    tree = plain({entry.name: getattr(state, entry.name) for entry in fields(state)})
    return tensors, json.dumps(tree)


def unpack(tensors: Mapping[str, Tensor], text: str) -> State:
    """State from the tensors and the text of :func:`pack`.

    Raises
    ------
    DataError
        If tensors and text do not belong together.
    """

    def tree(value: Any) -> Any:
        if isinstance(value, list):
            return [tree(item) for item in value]
        if isinstance(value, dict):
            if TENSOR in value:
                return tensors[value[TENSOR]]
            return {key: tree(item) for key, item in value[ITEMS]}
        return value

    try:
        return State(**tree(json.loads(text)))
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        message = (
            f"the state of the training is damaged ({one_line(error)}): start over with "
            f"--no-resume (resume=False)"
        )
        raise DataError(message) from error

"""Items: what one element of a source holds, as text, as a chat or as token ids.

Sources come in many shapes: strings, dicts, tensors, batches of a DataLoader, pairs of
input and target, values of a JSON file. Every element is taken apart into items of three
kinds. What is not understood is refused with a description of what was seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any, Literal, TypeGuard

import numpy as np
from torch import Tensor

from layerwise.errors import DataError, UsageError

Kind = Literal["token ids", "chat", "text"]

FIELDS = ("input_ids", "messages", "text")  # of a dict, the first one that is there
EXPECTED = "input_ids, text or messages"
DEEPEST = 4  # lists in lists, of a batch of chats
FIELDS_SHOWN = 8
LISTS_SHOWN = 3  # in one another
FIELDS_LENGTH = 40  # characters shown of a name
PAIR = 2


@dataclass(frozen=True, eq=False)
class Item:
    """One text, one chat (a list of messages), or the token ids of one sequence.

    ``where`` names its place, for messages.
    """

    kind: Kind
    value: Any
    where: str


def items_of(value: Any, where: str, depth: int = 0) -> Iterator[Item]:
    """Take one element of a source apart.

    Parameters
    ----------
    value
        A string; token ids of one sequence, or of a batch; a list of messages; a dict with
        one of these; a batch of them; or a tuple, of which the first is taken: an input
        with its target.
    where
        Name of the element, for messages.
    depth
        Number of lists and dicts around it.

    Raises
    ------
    UsageError
        The element is none of these.
    """
    if isinstance(value, str):
        yield Item("text", value, where)
    elif isinstance(value, Mapping):
        yield from items_of(_field_of(value, where), where, depth + 1)
    elif isinstance(value, Tensor | np.ndarray) and value.ndim:
        rows = [value] if value.ndim == 1 or len(value) == 1 else value
        yield from (Item("token ids", row, where) for row in rows)
    elif not _is_list(value) or depth > DEEPEST:
        raise refusal(value, where)
    elif is_message(value[0]):
        yield Item("chat", list(value), where)
    elif is_number(value[0]):
        yield Item("token ids", value, where)
    elif _is_sample(value, where):
        yield from items_of(value[0], where, depth + 1)
    else:
        for element in value:
            yield from items_of(element, where, depth + 1)


def field_values(record: Any, field: str, where: str) -> list[Any]:
    """Values under a field; a dot leads into a dict, or into those of a list.

    Parameters
    ----------
    record
        A dict.
    field
        Name such as ``"text"`` or ``"a.b"``.
    where
        Name of the record, for messages.

    Raises
    ------
    DataError
        The record is not a dict, or has no such field.
    """
    if not isinstance(record, Mapping):
        kind = type(record).__name__
        message = f"{where} holds a {kind}, not an object {{...}}: correct the line"
        raise DataError(message)
    if field in record:
        return [record[field]]
    first, dot, rest = field.partition(".")
    if not dot or first not in record:
        message = f"{where} has no field {field!r}; found: {shown_fields(record)}"
        raise DataError(message)
    inner = record[first] if isinstance(record[first], list) else [record[first]]
    return [value for one in inner for value in field_values(one, rest, where)]


def shown_fields(record: Mapping[Any, Any]) -> str:
    """Names of the first fields, for messages."""
    names = [repr(str(name)[:FIELDS_LENGTH]) for name in list(record)[:FIELDS_SHOWN]]
    return ", ".join(names) or "none"


def is_number(value: Any) -> bool:
    """Whether a value is one number, and not a list or a tensor of them."""
    return isinstance(value, Number) or (
        isinstance(value, Tensor | np.ndarray) and not value.ndim
    )


def is_message(value: Any) -> bool:
    """Whether a value is a message of a chat."""
    return isinstance(value, Mapping) and "role" in value and "content" in value


def refusal(value: Any, where: str) -> UsageError:
    """Error about an element that is not understood."""
    return UsageError(f"{where} is {described(value)}: expected {EXPECTED}")


def described(value: Any, depth: int = 0) -> str:
    """What a value is, in a few words."""
    if isinstance(value, Mapping):
        names = ", ".join(str(name)[:FIELDS_LENGTH] for name in list(value)[:FIELDS_SHOWN])
        return f"a dict with keys {names}" if names else "a dict without keys"
    if isinstance(value, Tensor | np.ndarray):
        return f"a tensor of {value.dtype}, shape {tuple(value.shape)}"
    name = type(value).__name__
    if isinstance(value, list | tuple) and not value:
        return f"an empty {name}"
    if isinstance(value, list | tuple) and depth < LISTS_SHOWN:
        noun, space, rest = described(value[0], depth + 1).partition(" ")[2].partition(" ")
        return f"a {name} of {len(value)} {noun}{'s' * (len(value) > 1)}{space}{rest}"
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"


def _field_of(record: Mapping[Any, Any], where: str) -> Any:
    """Value of the first known field of a dict."""
    for name in FIELDS:
        if name in record:
            return record[name]
    raise refusal(record, where)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a list that is not empty; bytes are not."""
    return isinstance(value, Sequence) and not isinstance(value, bytes) and len(value) > 0


def _is_sample(value: Sequence[Any], where: str) -> bool:
    """Whether a list is an input and what belongs to it: a target, a mask.

    Of one-dimensional arrays in a list there may be two; more could as well be a batch.
    """
    array = isinstance(value[0], Tensor | np.ndarray)
    if isinstance(value, tuple):
        return array or isinstance(value[0], list)
    if array and value[0].ndim == 1 and len(value) > PAIR:
        raise refusal(value, where)
    return array

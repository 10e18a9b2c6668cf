"""Material: what a source holds, before it is cut into windows.

A source is a name or an object. Its items are texts, which are joined and tokenized, chats,
which the chat template of the tokenizer turns into texts, or token ids: one stream, from
which windows are drawn, or sequences, which are windows already.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from layerwise.errors import DataError, UsageError, one_line
from layerwise.run.data.files import read_name
from layerwise.run.data.items import (
    FIELDS,
    Item,
    Kind,
    described,
    is_message,
    is_number,
    items_of,
    refusal,
)
from layerwise.run.data.texts import PARAGRAPH, Part, Text, check_text

IDS, CHATS, STRINGS = "token ids", "the chats", "the list of strings"
END = object()
NOTHING = "the calibration source is empty: give text or token ids"


@dataclass(frozen=True, eq=False)
class Material:
    """Items of one kind.

    Parameters
    ----------
    kind
        ``"text"``, ``"chat"``, ``"stream"`` of token ids, or ``"sequences"`` of them.
    content
        A :class:`~layerwise.run.data.texts.Text`, a list of chats, the ids, or the
        sequences, which are read one by one.
    description
        Description of the source.
    """

    kind: Literal["text", "chat", "stream", "sequences"]
    content: Any
    description: str

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a tokenizer makes the token ids."""
        return self.kind in ("text", "chat")

    def text(self, tokenizer: Any) -> Text:
        """Text of the material; chats as the chat template writes them."""
        if tokenizer is None:
            message = f"{self.description} needs a tokenizer: pass one"
            raise UsageError(message)
        if self.kind == "text":
            text: Text = self.content
            return text
        chats = enumerate(self.content)
        texts = [_rendered(chat, tokenizer, number) for number, chat in chats]
        return Text(texts, PARAGRAPH, self.description)


def material_of(source: Any, part: Part, enough: int | None = None) -> Material:
    """Read a source.

    Parameters
    ----------
    source
        A name, see :func:`layerwise.run.data.files.read_name`, or an object: strings,
        token ids, dicts, a data set, a DataLoader, or any iterable of such elements.
    part
        Split of a public data set.
    enough
        Characters after which an iterable that is not a list need not be read further.

    Raises
    ------
    UsageError
        The source is not understood.
    DataError
        The source is empty, missing or damaged.
    """
    if isinstance(source, str | os.PathLike):
        found = read_name(source, part)
        if isinstance(found, Text):
            return Material("text", found, found.description)
        name = os.fspath(source)
        return _material(_listed(found, name), name, None)
    if not isinstance(source, Iterable):
        kind = type(source).__name__
        message = f"type {kind} is not a calibration source: pass text or token ids"
        raise UsageError(message)
    if isinstance(source, Mapping):
        return _of_mapping(source, part, enough)
    if isinstance(source, Tensor):
        if not source.numel():
            raise DataError(NOTHING)
        if source.ndim == 1:
            return Material("stream", source, IDS)
        return Material("sequences", source, IDS)
    return _of_iterable(source, enough)


def _of_mapping(source: Mapping[Any, Any], part: Part, enough: int | None) -> Material:
    """Material of a dict of columns, or of the only split of a data set."""
    if _is_split(next(iter(source.values()), None)):
        if len(source) > 1:
            names = ", ".join(map(repr, source))
            message = f"the data set has the splits {names}: pass one of them"
            raise UsageError(message)
        return material_of(next(iter(source.values())), part, enough)
    for name in FIELDS:
        if name in source:
            value = source[name]
            alone = isinstance(value, str)
            return material_of([value] if alone else value, part, enough)
    raise refusal(source, "the calibration source")


def _is_split(value: Any) -> bool:
    """Whether a value is a data set itself: rows with named columns."""
    return hasattr(value, "column_names") and hasattr(value, "features")


def _of_iterable(source: Iterable[Any], enough: int | None) -> Material:
    """Material of the elements of an iterable."""
    elements = iter(_known_columns(source))
    first = next(elements, END)
    if first is END:
        raise DataError(NOTHING)
    rest = itertools.chain([first], elements)
    if is_number(first):
        return Material("stream", list(rest), IDS)
    if is_message(first):
        return Material("chat", [list(rest)], CHATS)
    if isinstance(source, list | tuple):
        enough = None
    name = f"the {type(source).__name__}" if _is_split(source) else None
    return _material(_taken_apart(rest, source), name, enough)


def _known_columns(source: Any) -> Any:
    """A data set with the one column that is read, so that no image is decoded."""
    names = getattr(source, "column_names", None)
    known = next((name for name in FIELDS if name in (names or ())), None)
    if known is None or not hasattr(source, "select_columns"):
        return source
    return source.select_columns([known])


def _taken_apart(elements: Iterable[Any], source: Any) -> Iterator[Item]:
    """Items of all elements; errors describe the whole source if it is a list."""
    for number, element in enumerate(elements):
        where = f"element {number}"
        try:
            yield from items_of(element, where)
        except UsageError as error:
            if number or not isinstance(source, list | tuple):
                raise
            raise refusal(source, "the calibration source") from error


def _listed(values: Iterable[tuple[str, Any]], name: str) -> Iterator[Item]:
    """Items of the values of a file."""
    empty = True
    for where, value in values:
        empty = False
        yield from items_of(value, where)
    if empty:
        message = f"{name} is empty: give a file with text"
        raise DataError(message)


def _material(items: Iterator[Item], name: str | None, enough: int | None) -> Material:
    """Material of items, which must be of one kind; of a source with or without a name."""
    first = next(items, None)
    if first is None:
        raise DataError(NOTHING)
    values = _of_one_kind(itertools.chain([first], items), first.kind)
    if first.kind == "token ids":
        return Material("sequences", values, name or IDS)
    if first.kind == "chat":
        return Material("chat", _read(values, enough), name or CHATS)
    text = Text(_read(values, enough), PARAGRAPH, name or STRINGS)
    return Material("text", text, text.description)


def _of_one_kind(items: Iterator[Item], kind: Kind) -> Iterator[Any]:
    for item in items:
        if item.kind != kind:
            message = (
                f"{item.where} holds {item.kind}, the elements before it {kind}: give "
                f"one kind only"
            )
            raise UsageError(message)
        yield check_text(item.value, item.where) if kind == "text" else item.value


def _read(values: Iterator[Any], enough: int | None) -> list[Any]:
    """Read all values, or as many as hold enough characters."""
    found, characters = [], 0
    for value in values:
        found.append(value)
        contents = [value] if isinstance(value, str) else [m.get("content") for m in value]
        characters += sum(len(str(content)) for content in contents)
        if enough is not None and characters >= enough:
            break
    return found


def _rendered(chat: list[Any], tokenizer: Any, number: int) -> str:
    """Text of one chat, without the BOS of the template: the windows decide about it."""
    wrong = next((message for message in chat if not is_message(message)), None)
    if wrong is not None:
        message = f"chat {number} holds {described(wrong)}: a message has role and content"
        raise UsageError(message)
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:
        message = (
            f"the chat template of the tokenizer refuses chat {number}: "
            f"{one_line(error)}; give a tokenizer with a chat_template, or texts"
        )
        raise UsageError(message) from error
    text = check_text(text, f"chat {number}")
    bos = getattr(tokenizer, "bos_token", None)
    return text.removeprefix(bos) if bos else text

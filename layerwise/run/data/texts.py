"""Sources of text: public data sets, text files, JSON lines, lists of strings.

The same reader serves calibration and evaluation. They differ in the split of a data set
and in the separator of its documents. As in the papers, WikiText-2 is joined by single
spaces for calibration and by two newlines for evaluation.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from layerwise.errors import DataError, UsageError, one_line
from layerwise.run.checkpoints.files import check_regular, read_bytes

Part = Literal["train", "evaluation"]

PARAGRAPH = "\n\n"
DATASETS = ("wikitext2", "c4")
C4_EVALUATION_DOCUMENTS = 1100  # the protocol of SparseGPT and its successors
FIELDS_SHOWN = 8


@dataclass(frozen=True, eq=False)
class Text:
    """Documents, their separator in the joined text, and a description of their source.

    ``windows`` is "stream" if windows are drawn from the joined text, and "documents" if
    each window is drawn from another document.
    """

    documents: Sequence[str]
    separator: str
    description: str
    windows: Literal["stream", "documents"] = "stream"

    def joined(self) -> str:
        """All documents as one non-empty string."""
        text = self.separator.join(self.documents)
        if not text.strip():
            message = f"{self.description} holds no text: give a source with content"
            raise DataError(message)
        return text


def read_text(source: str | os.PathLike[str] | Sequence[str], part: Part) -> Text:
    """Read ``wikitext2``, ``c4``, ``file.txt``, ``file.jsonl:field`` or strings.

    Raises
    ------
    UsageError
        The name is none of these, no field is named, or a package is not installed.
    DataError
        The file or data set is missing, empty or damaged.
    """
    if not isinstance(source, (str, os.PathLike)):
        return Text(_checked_documents(source), PARAGRAPH, "the list of strings")
    name = os.fspath(source)
    if name in DATASETS:
        return _wikitext2(part) if name == "wikitext2" else _c4(part)
    path, field = _file_of(name)
    documents = [_read_utf8(path)] if field is None else _read_json_lines(path, field)
    return Text(documents, PARAGRAPH, name)


def check_source(source: str | os.PathLike[str]) -> None:
    """Refuse a source that :func:`read_text` would refuse before it reads it.

    Raises
    ------
    UsageError
        The name is unknown, or a field is not named.
    DataError
        The file cannot be opened.
    """
    name = os.fspath(source)
    if name in DATASETS:
        return
    path, field = _file_of(name)
    check_regular(path)
    if field == "":
        message = f"{path} needs a field, as in {path}:field"
        raise UsageError(message)


def _file_of(name: str) -> tuple[Path, str | None]:
    """Text file that a name means, and the field of its JSON lines if it has such."""
    file, _, field = name.rpartition(":")
    if name.lower().endswith(".txt"):
        return Path(name), None
    if file.lower().endswith(".jsonl"):
        return Path(file), field
    if name.lower().endswith(".jsonl"):
        return Path(name), ""
    close = difflib.get_close_matches(name, DATASETS, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(DATASETS)}"
    message = (
        f"unknown text source {name[:80]!r}: {hint} Or give a file.txt, a "
        f"file.jsonl:field or a list of strings"
    )
    raise UsageError(message)


def _wikitext2(part: Part) -> Text:
    split = "train" if part == "train" else "test"
    lines = _load_column("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    separator = " " if part == "train" else PARAGRAPH
    return Text(list(lines), separator, f"wikitext2 ({split})")


def _c4(part: Part) -> Text:
    if part == "train":
        files = {"train": "en/c4-train.00000-of-01024.json.gz"}
        documents = _load_column("allenai/c4", data_files=files, split="train")
        return Text(documents, " ", "c4 (train, first shard)", windows="documents")
    files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    documents = _load_column("allenai/c4", data_files=files, split="validation")
    first = list(itertools.islice(documents, C4_EVALUATION_DOCUMENTS))
    return Text(first, " ", f"c4 (first {len(first)} validation documents)")


def _load_column(name: str, *arguments: str, **options: Any) -> Sequence[str]:
    """Column ``text`` of a data set from the hub or its local cache."""
    try:
        import datasets
    except ImportError as error:
        message = (
            f"{name} needs the package datasets: "
            f'pip install "layerwise[data]", or name a .txt or .jsonl file'
        )
        raise UsageError(message) from error
    try:
        loaded = datasets.load_dataset(name, *arguments, **options)
        column: Sequence[str] = loaded["text"]
    except Exception as error:
        message = (
            f"data set {name} cannot be loaded: {one_line(error)}; go online once to "
            f"cache it, or name a .txt or .jsonl file"
        )
        raise DataError(message) from error
    return column


def _read_utf8(path: Path) -> str:
    data = read_bytes(path, largest=None)
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 (byte {error.start}): convert it first"
        raise DataError(message) from error
    if not text.strip():
        message = f"{path} is empty: give a file with text"
        raise DataError(message)
    return text


def _read_json_lines(path: Path, field: str) -> list[str]:
    """Strings under ``field`` of every line that is not blank."""
    documents = []
    # not splitlines(): JSON strings may contain line separators other than "\n"
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            message = f"{where} is not JSON: {one_line(error)}; correct the line"
            raise DataError(message) from error
        if not isinstance(value, dict):
            kind = type(value).__name__
            message = f"{where} holds a {kind}, not an object {{...}}: correct the line"
            raise DataError(message)
        present = ", ".join(map(repr, list(value)[:FIELDS_SHOWN])) or "none"
        if not field:
            message = f"{path} needs a field, as in {path}:field; found: {present}"
            raise UsageError(message)
        if field not in value:
            message = f"{where} has no field {field!r}; found: {present}"
            raise DataError(message)
        documents.append(_checked(value[field], f"{where}, field {field!r}"))
    return documents


def _checked_documents(documents: Iterable[Any]) -> list[str]:
    return [_checked(text, f"document {i}") for i, text in enumerate(documents)]


def _checked(text: Any, where: str) -> str:
    """Return a string that can be encoded, or raise a DataError."""
    if not isinstance(text, str):
        kind = type(text).__name__
        message = f"{where} has type {kind}, not string: choose another field"
        raise DataError(message)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        message = (
            f"{where} has an unpaired surrogate (character {error.start}): correct the text"
        )
        raise DataError(message) from error
    return text

"""Texts: documents with their separator, and the public data sets.

The same source serves calibration and evaluation. They differ in the split of a data set
and in the separator of its documents. As in the papers, WikiText-2 is joined by single
spaces for calibration and by two newlines for evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from layerwise.errors import DataError, UsageError, one_line

Part = Literal["train", "evaluation"]

PARAGRAPH = "\n\n"
DATASETS = ("wikitext2", "c4")
C4_EVALUATION_DOCUMENTS = 1100  # the protocol of SparseGPT and its successors


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


def data_set(name: str, part: Part) -> Text:
    """Read ``wikitext2`` or ``c4``.

    Raises
    ------
    UsageError
        The package datasets is not installed.
    DataError
        The data set is neither on this machine nor reachable.
    """
    return _wikitext2(part) if name == "wikitext2" else _c4(part)


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


def check_text(text: Any, where: str) -> str:
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

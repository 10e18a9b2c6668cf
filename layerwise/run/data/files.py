"""Files of calibration and evaluation data, as named on the command line.

``FILE.txt`` is one text. ``FILE.jsonl`` (one value per line), ``FILE.json`` and
``FILE.parquet`` hold records; ``:FIELD`` behind the name chooses one of their fields, by
default ``input_ids``, ``messages`` or ``text``. All but parquet may be compressed, as
``FILE.txt.gz``.
"""

from __future__ import annotations

import difflib
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, UsageError, one_line
from layerwise.run.checkpoints.files import check_regular, open_regular, read_bytes
from layerwise.run.data.items import FIELDS, field_values, is_message, shown_fields
from layerwise.run.data.texts import DATASETS, PARAGRAPH, Part, Text, data_set

TEXTS = (".txt", ".txt.gz")
LINES = (".jsonl", ".jsonl.gz")
RECORDS = (*LINES, ".json", ".json.gz", ".parquet")
GIVEN = " (given from Python)"  # behind data that a recipe cannot repeat
LARGEST = 1 << 30  # bytes of a file after decompression
LONGEST_LINE = 1 << 20  # that is read only to check it
FORMS = "file.txt, file.jsonl:field, file.json:field or file.parquet:field"


def read_name(
    source: str | os.PathLike[str], part: Part
) -> Text | Iterator[tuple[str, Any]]:
    """Read ``wikitext2``, ``c4``, a text file, or the values of a file with records.

    Returns
    -------
    Text or iterator
        The text; or every value, with its place for messages.

    Raises
    ------
    UsageError
        The name is none of these, no field is named, or a package is not installed.
    DataError
        The file or data set is missing, empty or damaged.
    """
    name = os.fspath(source)
    if name in DATASETS:
        return data_set(name, part)
    path, field = file_of(name)
    kind = path.name.lower()
    if kind.endswith(TEXTS):
        return Text([_read_utf8(path)], PARAGRAPH, name)
    if kind.endswith(".parquet"):
        return _parquet_values(path, field)
    if kind.endswith(LINES):
        return _line_values(path, field)
    return _json_values(path, field)


def check_source(source: str | os.PathLike[str]) -> None:
    """Refuse a source that :func:`read_name` would refuse before it reads it.

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
    path, field = file_of(name)
    check_regular(path)
    if field:
        return
    kind = path.name.lower()
    if field == "" or (kind.endswith(LINES) and not _first_line_is_known(path)):
        message = f"{path} needs a field, as in {path}:field"
        raise UsageError(message)


def holds_text(source: str | os.PathLike[str]) -> bool:
    """Whether a name can only mean text; records may hold token ids as well."""
    name = os.fspath(source)
    return name in DATASETS or name.lower().endswith(TEXTS)


def _first_line_is_known(path: Path) -> bool:
    """Whether the first record has a field that is found without its name."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            record = json.loads(file.readline(LONGEST_LINE))
    except (OSError, EOFError, zlib.error, ValueError, RecursionError):
        return True  # reading the whole file will say more
    return not isinstance(record, dict) or _holds_known(record)


def _holds_known(record: dict[str, Any]) -> bool:
    return is_message(record) or any(name in record for name in FIELDS)


def file_of(name: str) -> tuple[Path, str | None]:
    """File that a name means, and the field of its records if one is named."""
    file, _, field = name.rpartition(":")
    if name.lower().endswith((*TEXTS, *RECORDS)):
        return Path(name), None
    if file.lower().endswith(RECORDS):
        return Path(file), field
    if name.endswith(GIVEN):
        message = (
            f"the calibration data of the recipe, {name}, is not in it: give the same data "
            f"again"
        )
        raise UsageError(message)
    close = difflib.get_close_matches(name, DATASETS, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(DATASETS)}"
    message = (
        f"unknown text source {name[:80]!r}: {hint} Or give a {FORMS}, or a list of strings"
    )
    raise UsageError(message)


def _line_values(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    """Values of every line that is not blank."""
    # not splitlines(): JSON strings may contain line separators other than "\n"
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if line.strip():
            where = f"{path} line {number}"
            record = _parsed(line, where)
            for value in _chosen(record, field, path, where):
                yield _place(where, field), value


def _json_values(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    """Values of one JSON document: of its records if it is a list of them."""
    document, where = _parsed(_read_utf8(path), str(path)), str(path)
    for record in document if field and isinstance(document, list) else [document]:
        for value in _chosen(record, field, path, where):
            yield _place(where, field), value


def _parquet_values(path: Path, field: str | None) -> Iterator[tuple[str, Any]]:
    """Values of one column, which may lead into a struct."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = (
            f'{path} is read by the package pyarrow: pip install "layerwise[data]", or '
            f"name a .txt or .jsonl file"
        )
        raise UsageError(message) from error
    try:
        with pyarrow.parquet.ParquetFile(check_regular(path)) as file:
            names = file.schema_arrow.names
            chosen = _column(path, names, field)
            column = chosen if chosen in names else chosen.partition(".")[0]
            for batch in file.iter_batches(columns=[column]):
                for record in batch.to_pylist():
                    for value in _chosen(record, chosen, path, str(path)):
                        yield _place(str(path), chosen), value
    except (OSError, pyarrow.ArrowException) as error:
        message = f"{path} is not readable as parquet: {one_line(error)}; write it again"
        raise DataError(message) from error


def _column(path: Path, names: list[str], field: str | None) -> str:
    """Field to read: the one that is named, or the first known one."""
    found = field or next((name for name in FIELDS if name in names), None)
    if not found or field == "":
        raise _unnamed(path, dict.fromkeys(names))
    if found not in names and found.partition(".")[0] not in names:
        shown = shown_fields(dict.fromkeys(names))
        message = f"{path} has no field {found!r}; found: {shown}"
        raise DataError(message)
    return found


def _place(where: str, field: str | None) -> str:
    return where if field is None else f"{where}, field {field!r}"


def _chosen(record: Any, field: str | None, path: Path, where: str) -> list[Any]:
    """Values of a record under a field; without one, the record itself."""
    if field:
        return field_values(record, field, where)
    if isinstance(record, dict) and (field == "" or not _holds_known(record)):
        raise _unnamed(path, record)
    return [record]


def _unnamed(path: Path, record: dict[str, Any]) -> UsageError:
    return UsageError(
        f"{path} needs a field, as in {path}:field; found: {shown_fields(record)}"
    )


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"{where} is not JSON: {one_line(error)}; correct it"
        raise DataError(message) from error


def _read_utf8(path: Path) -> str:
    data = _read_bytes(path)
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        message = f"{path} is not UTF-8 (byte {error.start}): convert it first"
        raise DataError(message) from error
    if not text.strip():
        message = f"{path} is empty: give a file with text"
        raise DataError(message)
    return text


def _read_bytes(path: Path) -> bytes:
    """Bytes of a file, decompressed."""
    if path.suffix.lower() != ".gz":
        return read_bytes(path, largest=None)
    try:
        with open_regular(path) as packed, gzip.open(packed) as file:
            data = file.read(LARGEST + 1)
    except (zlib.error, EOFError, OSError) as error:
        message = f"{path} is not readable as gzip: {one_line(error)}; write it again"
        raise DataError(message) from error
    if len(data) > LARGEST:
        message = f"{path} has more than {LARGEST} bytes of text: give a part of it"
        raise DataError(message)
    return data

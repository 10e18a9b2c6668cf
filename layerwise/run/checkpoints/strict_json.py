"""JSON from untrusted files: one value per key, no NaN, and errors that name the file.

Python keeps the last of two equal keys, other readers keep the first. So a file with
duplicate keys is ambiguous, and is refused.
"""

import json
from pathlib import Path
from typing import Any

from layerwise.errors import DataError
from layerwise.run.checkpoints.files import read_bytes

SHOWN = 40  # characters of a key in a message


def read_json(path: Path) -> Any:
    """Parse a JSON file, or raise a DataError with its path and the position."""
    return parse_json(read_bytes(path), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file whose value must be an object (``{...}``)."""
    value = read_json(path)
    if not isinstance(value, dict):
        kind = type(value).__name__
        message = f"{path} must hold a JSON object, not a {kind}: restore the file"
        raise DataError(message)
    return value


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON bytes; ``where`` names their origin in the error."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_nan,
        )
    except (ValueError, RecursionError) as error:
        message = f"{where} is not usable JSON: {error}; restore the file"
        raise DataError(message) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            message = f"key {key[:SHOWN]!r} appears twice"
            raise ValueError(message)
        value[key] = item
    return value


def _refuse_nan(constant: str) -> float:
    if constant == "NaN":
        message = "the value NaN"
        raise ValueError(message)
    return float(constant)  # some configurations have infinite limits

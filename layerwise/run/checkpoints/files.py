"""Regular files only: a pipe or a device would block a reader, or never end."""

import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from layerwise.errors import DataError, one_line
from layerwise.run.checkpoints.atomic import atomic_write

CHUNK_BYTES = 1 << 24
LARGEST_TEXT = 1 << 27  # bytes; larger than any JSON, YAML or log of a model


def check_regular(path: Path) -> Path:
    """Return the path, or raise if it is not a regular file, or a link to one.

    Raises
    ------
    DataError
        It is something else, or cannot be read.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise DataError(_unreadable(path, error)) from error
    if not stat.S_ISREG(mode):
        message = f"{path} is not a regular file: replace it by the file itself"
        raise DataError(message)
    return path


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises
    ------
    DataError
        As :func:`check_regular`.
    """
    check_regular(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error


def read_bytes(path: Path, largest: int | None = LARGEST_TEXT) -> bytes:
    """Content of a regular file.

    Parameters
    ----------
    path
        The file.
    largest
        Bytes above which the file is refused; None: any size.

    Raises
    ------
    DataError
        As :func:`check_regular`, or the file is too large.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if largest is not None and size > largest:
            message = (
                f"{path} has {size} bytes, at most {largest} are read: restore the file"
            )
            raise DataError(message)
        try:
            return stream.read()
        except OSError as error:
            raise DataError(_unreadable(path, error)) from error


def copy_file(source: Path, target: Path) -> None:
    """Copy a regular file atomically, with one chunk in memory.

    Raises
    ------
    DataError
        The source cannot be read, or the target cannot be written.
    """
    atomic_write(
        target,
        lambda stream: stream.writelines(_chunks(source)),
        size=check_regular(source).stat().st_size,
    )


def _chunks(path: Path) -> Iterator[bytes]:
    with open_regular(path) as stream:
        while True:
            try:
                chunk = stream.read(CHUNK_BYTES)
            except OSError as error:
                raise DataError(_unreadable(path, error)) from error
            if not chunk:
                return
            yield chunk


def _unreadable(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or one_line(error)
    return f"cannot read {path}: {reason}; check the file"

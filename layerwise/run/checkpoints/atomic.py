"""Atomic files: a reader sees the old content or the new content, never a part.

The content is written to a hidden temporary file in the same folder, flushed to the disk,
and then renamed over the target. The folder is flushed last, so that the name points at
complete content even after a power cut.
"""

import errno
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from layerwise.errors import DataError

TEMPORARY_SUFFIX = ".tmp"

Content = bytes | Callable[[BinaryIO], object]


def atomic_write(path: Path, data: Content, *, size: int | None = None) -> None:
    """Replace a file by new content, completely or not at all.

    Parameters
    ----------
    path
        The file to write; its folder must exist.
    data
        The content, or a function that writes it to a stream.
    size
        Bytes that ``data`` will write, for the error message of a full disk; not needed
        if ``data`` are bytes.

    Raises
    ------
    DataError
        The path is a device, a pipe or a folder, which must not be replaced, or the file
        system refuses (full, read-only, no permission, input or output error). The old
        content is intact and no temporary file remains.
    """
    # processes on machines that share a disk may have the same id
    own = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{own}{TEMPORARY_SUFFIX}")
    needed = len(data) if isinstance(data, bytes) else size
    try:
        if path.exists() and not path.is_file():
            message = f"cannot write {path}: it is not a file; choose another name"
            raise DataError(message)
        try:
            with temporary.open("wb") as stream:
                if isinstance(data, bytes):
                    stream.write(data)
                else:
                    data(stream)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_folder(path.parent)
    except OSError as error:
        amount = "" if needed is None else f" ({needed} bytes needed)"
        message = (
            f"cannot write {path}{amount}: {error.strerror or error}; "
            f"free space there or choose another folder"
        )
        raise DataError(message) from error


def remove_temporaries(folder: Path) -> None:
    """Delete temporary files of killed writers in a folder; no writer may be active."""
    for path in folder.rglob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, if the system supports that."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems cannot flush a folder
            raise
    finally:
        os.close(descriptor)

"""Lock of an output: one run at a time works on it.

The lock is an flock on a hidden file beside the output. The system releases it when the
process ends, however it ends, so a file that a killed run left is no obstacle. Workers of a
run do not inherit it. Some network file systems have no such locks: there the log says so,
and blocks of two runs are still never mixed, because a run reads only the files that it
wrote itself.
"""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerwise.errors import DataError, UsageError

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]

FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
LONGEST_HOLDER = 200  # bytes of the file that names the holder
LOGGER = logging.getLogger(__name__)


def lock_path(output: Path) -> Path:
    """File whose lock a run holds."""
    return output.with_name(f".{output.name}.lock")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Keep other runs away from an output.

    Parameters
    ----------
    output
        The folder that the run will become; its parent must exist.

    Raises
    ------
    UsageError
        Another run holds the lock.
    DataError
        The file of the lock cannot be written.
    """
    path = lock_path(output)
    try:
        descriptor = _take(path, output)
    except OSError as error:
        message = f"cannot create {path}: {error.strerror}; choose another output"
        raise DataError(message) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # first: nobody may lock a file without a name
        os.close(descriptor)


def _take(path: Path, output: Path) -> int:
    """Lock the file that has the name now, and write into it who holds it."""
    while True:
        descriptor = os.open(path, FLAGS, 0o666)
        try:
            if _lock(descriptor, output) and not _has_name(descriptor, path):
                os.close(descriptor)  # its holder removed it in between
                continue
            os.ftruncate(descriptor, 0)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            os.write(descriptor, holder.encode())
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _lock(descriptor: int, output: Path) -> bool:
    """Lock an open file; return False, and say so, where the file system cannot."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, LONGEST_HOLDER).decode(errors="replace")
        message = (
            f"another run is writing {output} ({' '.join(holder.split()) or 'starting'}): "
            f"wait until it ends, or choose another output"
        )
        raise UsageError(message) from None
    except OSError as error:
        LOGGER.warning(
            "the file system of %s has no locks (%s): start no second run for this output",
            output,
            error.strerror,
        )
        return False
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

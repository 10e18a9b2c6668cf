"""Standard streams of a command: lost progress is no failure, lost results are one line.

A reader of a pipe may end, a disk may be full, a stream may be closed. Progress and
messages go to stderr, and never end a run. Results go to stdout.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from layerwise.errors import DataError, one_line


class Lasting:
    """A text stream that survives the loss of its file.

    Parameters
    ----------
    stream
        The stream; None if it is closed.
    results
        Whether it is an error if text is lost.
    """

    def __init__(self, stream: TextIO | None, *, results: bool) -> None:
        self._stream, self._results = stream, results
        self._lost: str | None = None  # why

    def write(self, text: str) -> int:
        """Write text; characters that the encoding lacks are escaped."""
        if not isinstance(text, str):  # libraries try what kind of stream this is
            message = f"a text stream takes no {type(text).__name__}"
            raise TypeError(message)
        with self._losing():
            if self._stream is not None and text:
                encoding = self._stream.encoding or "utf-8"
                known = text.encode(encoding, "backslashreplace").decode(encoding)
                self._stream.write(known)
        return len(text)

    def flush(self) -> None:
        """Flush, as far as that is possible."""
        with self._losing():
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether a person reads it."""
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: closed in between
            self._give_up()
            self._lost = one_line(error)
        if self._results and self._lost is not None:  # again, if a library took no notice
            message = f"the results cannot be written to stdout: {self._lost}"
            raise DataError(message)

    def _give_up(self) -> None:
        """Send what is buffered to nowhere, or Python fails when it ends."""
        stream, self._stream = self._stream, None
        with suppress(OSError, ValueError, AttributeError):
            assert stream is not None
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
            stream.flush()


@contextmanager
def lasting(name: str, *, results: bool) -> Iterator[None]:
    """Put a lasting stream in the place of ``sys.stdout`` or ``sys.stderr``."""
    before = getattr(sys, name)
    stream = Lasting(before, results=results)
    setattr(sys, name, stream)
    try:
        yield
        stream.flush()
    finally:
        setattr(sys, name, before)


def open_standard_files() -> None:
    """Open those of the first three descriptors that are closed, on nowhere.

    Otherwise the next file gets such a number, and libraries print into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, number)
            if nowhere != number:
                os.close(nowhere)

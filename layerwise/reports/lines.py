"""Lines of progress on a stream, and one more whenever a step takes long."""

import threading
import time
from typing import TextIO

SILENCE = 20.0  # seconds


class Lines:
    """Writer of lines that does not stay silent for long while something is done.

    Parameters
    ----------
    stream
        Where the lines go.
    silence
        Seconds without a line after which one says what is still being done.
    """

    def __init__(self, stream: TextIO, silence: float = SILENCE) -> None:
        self._stream, self._silence = stream, silence
        self._status = ""
        self._since = self._last = time.monotonic()  # of the status, of the last line
        self._writing, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._break_silence, daemon=True).start()

    def write(self, line: str) -> None:
        """Write a line at once."""
        with self._writing:
            self._last = time.monotonic()
            self._stream.write(line + "\n")
            self._stream.flush()

    def now(self, status: str) -> None:
        """Remember what is done now."""
        self._status, self._since = status, time.monotonic()

    def close(self) -> None:
        """End the lines about long steps."""
        self._closed.set()

    def _break_silence(self) -> None:
        while not self._closed.wait(self._silence / 4):
            now = time.monotonic()
            if self._status and now - self._last >= self._silence:
                self.write(f"still {self._status}, for {now - self._since:.0f} s")

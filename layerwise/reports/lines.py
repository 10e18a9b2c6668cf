"""Lines of progress on a stream, and one about a step that takes long."""

import threading
import time
from typing import IO

PATIENCE = 1.0  # seconds
SILENCE = 20.0  # seconds
TICK = 0.25  # seconds between two looks at the clock


class Lines:
    """Writer of lines that is not silent for long while something is done.

    A step that is over soon is not mentioned.

    Parameters
    ----------
    stream
        Where the lines go.
    patience
        Seconds after which a step that still lasts gets its line.
    silence
        Seconds without a line after which one says what is still being done.
    """

    def __init__(
        self, stream: IO[str], patience: float = PATIENCE, silence: float = SILENCE
    ) -> None:
        self.patience = patience
        self._stream, self._silence = stream, silence
        self._status, self._shown = "", True
        self._since = self._last = time.monotonic()  # of the status, of the last line
        self._lock, self._closed = threading.RLock(), threading.Event()
        threading.Thread(
            target=self._watch, args=(min(TICK, silence / 4),), daemon=True
        ).start()

    def write(self, line: str) -> None:
        """Write a line at once."""
        with self._lock:
            self._last = time.monotonic()
            self._stream.write(line + "\n")
            self._stream.flush()

    def now(self, status: str) -> None:
        """Say what is done now."""
        with self._lock:
            self._status, self._shown, self._since = status, False, time.monotonic()

    def close(self) -> None:
        """End the lines about long steps."""
        self._closed.set()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _watch(self, tick: float) -> None:
        while not self._closed.wait(tick):
            with self._lock:
                now = time.monotonic()
                lasts, quiet = now - self._since, now - self._last
                if not self._shown and min(lasts, quiet) >= self.patience:
                    self.write(self._status)
                    self._shown = True
                elif self._status and quiet >= self._silence:
                    self.write(f"still {self._status}, for {lasts:.0f} s")

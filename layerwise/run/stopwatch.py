"""Wall time of the phases of a run, measured only when requested.

The run names its phases by ``with timed("solve")``. A :class:`Stopwatch` that is entered
around the run adds up their seconds. A phase inside another one is not counted twice.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch

_running: ContextVar["Stopwatch | None"] = ContextVar("stopwatch", default=None)


class Stopwatch:
    """Seconds of every phase inside the ``with`` block, by name.

    Parameters
    ----------
    device
        Device of the work; a GPU is synchronized at every change of phase.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.seconds: dict[str, float] = {}
        self._device = torch.device(device)
        self._open: list[str] = []
        self._since = 0.0
        self._token: Token[Stopwatch | None] | None = None

    def __enter__(self) -> "Stopwatch":
        self._token = _running.set(self)
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._token is not None
        _running.reset(self._token)

    def _begin(self, name: str) -> None:
        self._add_time()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)

    def _end(self) -> None:
        self._add_time()
        self._open.pop()

    def _add_time(self) -> None:
        """Add the time since the last change to the innermost phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Measure the time spent inside under a name, if a stopwatch is running."""
    watch = _running.get()
    if watch is None:
        yield
        return
    watch._begin(name)
    try:
        yield
    finally:
        watch._end()

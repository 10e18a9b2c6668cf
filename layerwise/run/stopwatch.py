"""Wall time of the stages of a run, for those who ask; nothing is measured otherwise.

The run names its stages by ``with timed("solve")``. A :class:`Stopwatch` that is entered
around the run adds up their seconds. A stage inside another one is not counted twice.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch

_running: ContextVar["Stopwatch | None"] = ContextVar("stopwatch", default=None)


class Stopwatch:
    """Seconds by stage of everything that runs inside its ``with`` block.

    Parameters
    ----------
    device
        Where the work is done; a GPU is waited for at every change of stage.
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
        self._book()
        self._open.append(name)
        self.seconds.setdefault(name, 0.0)

    def _end(self) -> None:
        self._book()
        self._open.pop()

    def _book(self) -> None:
        """Give the time since the last change to the innermost stage."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Book the time spent inside under a name, if a stopwatch runs."""
    watch = _running.get()
    if watch is None:
        yield
        return
    watch._begin(name)
    try:
        yield
    finally:
        watch._end()

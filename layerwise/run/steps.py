"""Steps of a command: what it does now, and how long that may take.

Reading, checking and hashing of a large model take minutes before the first layer. Each
step says so when it begins, and a step of many items says how far it is. Who listens is
chosen once, by :func:`listening`; without a listener the steps are silent.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

EVERY = 5.0  # seconds between two texts about the items of a step

Item = TypeVar("Item")
OnStatus = Callable[[str], None]

_listener: ContextVar[OnStatus | None] = ContextVar("listener", default=None)


@contextmanager
def listening(on_status: OnStatus) -> Iterator[None]:
    """Pass on what is done inside the context; the texts are many and short."""
    token = _listener.set(on_status)
    try:
        yield
    finally:
        _listener.reset(token)


def status(text: str) -> None:
    """Say what is done now, until the next text."""
    listener = _listener.get()
    if listener is not None:
        listener(text)


def counted(items: Iterable[Item], total: int, text: str) -> Iterator[Item]:
    """Items of a step, one by one, with a text about the rest every few seconds.

    Parameters
    ----------
    items, total
        The items, and their number.
    text
        What is done with them; said at once.
    """
    status(text)
    start = last = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - last >= EVERY:
            left = (now - start) / done * (total - done)
            status(f"{text}: {done} of {total} done, {about(left)} left")
            last = now
        yield item


def about(seconds: float) -> str:
    """Roughly so many seconds, in words: ``about 40 s``, ``about 3 min``."""
    if seconds < 90:
        return f"about {max(5, 5 * math.ceil(seconds / 5))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"

"""Steps of a command besides its layers: what it does now, and how long that may take.

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

EVERY = 5.0  # seconds between two lines about the items of a step

Item = TypeVar("Item")
OnText = Callable[[str], None]

_notes: ContextVar[OnText | None] = ContextVar("notes", default=None)
_status: ContextVar[OnText | None] = ContextVar("status", default=None)


@contextmanager
def listening(on_note: OnText, on_status: OnText | None = None) -> Iterator[None]:
    """Pass on the steps inside the context.

    Parameters
    ----------
    on_note
        Called with a line for the log: a step begins, or has come so far.
    on_status
        Called with what is done now, for a status line. These texts are many and short.
    """
    tokens = _notes.set(on_note), _status.set(on_status)
    try:
        yield
    finally:
        _notes.reset(tokens[0])
        _status.reset(tokens[1])


def note(text: str) -> None:
    """Say that a step begins."""
    _tell(_notes.get(), text)


def status(text: str) -> None:
    """Say what is done now."""
    _tell(_status.get(), text)


def counted(items: Iterable[Item], total: int, text: str) -> Iterator[Item]:
    """Items of a step, one by one, with a line about the rest every few seconds.

    Parameters
    ----------
    items, total
        The items, and their number.
    text
        What is done with them; said at once.
    """
    note(text)
    start = last = time.perf_counter()
    for done, item in enumerate(items):
        now = time.perf_counter()
        if done and now - last >= EVERY:
            left = (now - start) / done * (total - done)
            note(f"{text}: {done} of {total} done, {about(left)} left")
            last = now
        yield item


def about(seconds: float) -> str:
    """Roughly so many seconds, in words: ``about 40 s``, ``about 3 min``."""
    if seconds < 90:
        return f"about {max(5, 5 * math.ceil(seconds / 5))} s"
    if seconds < 5400:
        return f"about {round(seconds / 60)} min"
    return f"about {seconds / 3600:.1f} h"


def _tell(listener: OnText | None, text: str) -> None:
    if listener is not None:
        listener(text)

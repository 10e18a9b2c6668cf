"""SIGTERM, by which schedulers stop a job, ends a command as Ctrl-C does: in order.

The handler raises, so files are closed, partial folders are tidied and the exit code says
that the work can be continued. Without it the process would die where it stands.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from layerwise.errors import Interrupted


class Stopped(BaseException):
    """A SIGTERM came; no ``except Exception`` on the way may take it for a failure."""


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Raise :class:`~layerwise.errors.Interrupted` if a SIGTERM ends what runs inside.

    The handler that was there is restored. Only the main thread may have handlers, so in
    another one nothing changes; nor where SIGTERM is ignored or handled outside Python.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    if before in (None, signal.SIG_IGN):
        yield
        return
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except Stopped:
        message = (
            "stopped; what is finished of an output is kept, and the same command "
            "continues it"
        )
        raise Interrupted(message) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the tidying up
    raise Stopped

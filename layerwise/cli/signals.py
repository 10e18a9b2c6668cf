"""SIGTERM, by which schedulers stop a job, ends a command as Ctrl-C does: in order.

The handler raises, so files are closed, partial folders are tidied and the exit code says
that the work can be continued. Without it the process would die where it stands. Libraries
may turn what a handler raises into an error of their own, such as a failed import. So an
error after a signal is the end of a stopped command.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

from layerwise.errors import Interrupted


class Stopped(BaseException):
    """A SIGTERM came; no ``except Exception`` on the way may take it for a failure."""


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Raise an error that says so if a signal ends what runs inside.

    :class:`~layerwise.errors.Interrupted` after a SIGTERM, ``KeyboardInterrupt`` after a
    SIGINT. The handlers that were there are restored. Only the main thread may have
    handlers, so in another one nothing changes; nor for a signal that is ignored or handled
    outside Python.
    """
    received: list[int] = []
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            _handle(stack, signal.SIGTERM, received, Stopped)
            _handle(stack, signal.SIGINT, received, KeyboardInterrupt)
        try:
            yield
        except BaseException:
            if signal.SIGTERM in received:
                message = (
                    "stopped; what is finished of an output is kept, and the same command "
                    "continues it"
                )
                raise Interrupted(message) from None
            if received:
                raise KeyboardInterrupt from None
            raise


def _handle(
    stack: ExitStack, number: int, received: list[int], error: type[BaseException]
) -> None:
    """Let a signal be noted and raise an error, until the stack is closed."""
    before: Any = signal.getsignal(number)
    if before in (None, signal.SIG_IGN):
        return

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM:  # a second one must not disturb the tidying up
            signal.signal(number, signal.SIG_IGN)
        raise error

    signal.signal(number, stop)
    stack.callback(signal.signal, number, before)

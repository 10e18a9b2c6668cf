"""SIGTERM, by which schedulers stop a job, and Ctrl-C end a command in order.

The handler raises, so files are closed, partial folders are tidied, and the last line says
what is kept. Without it the process would die where it stands. A library may turn what the
handler raises into an error of its own; a command that was stopped ends as stopped all the
same.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from layerwise.errors import Interrupted

NOTHING = "stopped; nothing was saved"


class Stopped(BaseException):
    """A signal came; no ``except Exception`` on the way may take it for a failure."""


@contextmanager
def stopping_in_order() -> Iterator[None]:
    """Raise one line that says what is kept if a signal ends what runs inside.

    The handlers that were there are restored. Only the main thread may have handlers, so in
    another one nothing changes; nor where a signal is ignored or handled outside Python.

    Raises
    ------
    Interrupted
        After a SIGTERM.
    KeyboardInterrupt
        After Ctrl-C.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for other in handled:  # a second one must not disturb the tidying up
            signal.signal(other, signal.SIG_IGN)
        raise Stopped

    handled = [one for one in before if before[one] not in (None, signal.SIG_IGN)]
    for number in handled:
        signal.signal(number, stop)
    try:
        yield
    except BaseException as error:
        if not received:
            raise
        message = "; ".join(getattr(error, "__notes__", ())) or NOTHING
        kind = KeyboardInterrupt if received[0] == signal.SIGINT else Interrupted
        raise kind(message) from None
    finally:
        for number in handled:
            signal.signal(number, before[number])

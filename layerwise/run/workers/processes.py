"""Workers that are processes of this machine.

Each has a pipe and a sentinel of its own, so one that dies, of SIGKILL or for lack of
memory, is noticed at once and takes no other with it. Ctrl-C reaches the driver alone, and
workers end by themselves when the driver is gone.
"""

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from layerwise.run.workers.messages import (
    Gone,
    Message,
    Opening,
    Place,
    do_work,
    open_work,
    read_message,
)
from layerwise.run.workers.pool import Pool

# Forked processes would inherit locks of threads that they do not have, and no CUDA.
_CONTEXT = get_context("spawn")

# Seconds that a process gets to disappear after SIGKILL.
DEATH_SECONDS = 10.0


def local_workers(
    opening: Opening, count: int, *, threads: int = 1, device: str = "auto"
) -> Pool["LocalWorker"]:
    """Executor on processes of this machine.

    Parameters
    ----------
    opening
        Called once in every worker, with its `Place`; returns the function that does a
        job, given the payload of the job. It is pickled, so it is a function of a module,
        or a `functools.partial` of one.
    count
        Number of workers. They are started when there are jobs for them.
    threads
        Threads of PyTorch in each.
    device
        "auto" gives one visible GPU after the other to the workers, and the CPU where
        there is none; anything else is a device that all share.

    Returns
    -------
    Pool
        Executor for `run_jobs`, which closes it.

    Notes
    -----
    A Python script that uses workers must do so below ``if __name__ == "__main__":``, for
    every worker imports it.
    """
    places = [Place(i, _device(i, device), threads) for i in range(count)]
    return Pool(LocalBackend(opening), places)


def _device(index: int, device: str) -> str:
    if device != "auto":
        return device
    gpus = torch.cuda.device_count()
    return f"cuda:{index % gpus}" if gpus else "cpu"


@dataclass(eq=False)
class LocalWorker:
    """A process, and our end of its pipe."""

    process: SpawnProcess
    pipe: "Connection[bytes, bytes]"


class LocalBackend:
    """Starts processes and listens to them."""

    def __init__(self, opening: Opening) -> None:
        self._opening = pickle.dumps(opening)

    def launch(self, place: Place) -> LocalWorker:
        """Begin to start a process."""
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_serve,
            args=(theirs, self._opening, place),
            name=f"layerwise-worker-{place.index}",
            daemon=True,
        )
        with _without_interrupts(), contextlib.closing(theirs):
            process.start()
        return LocalWorker(process, ours)

    def send(self, handle: LocalWorker, payload: Any) -> None:
        """Give a payload to a worker that is ready and has none."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            handle.pipe.send_bytes(pickle.dumps(payload))

    def poll(
        self, handles: Sequence[LocalWorker], timeout: float | None
    ) -> list[tuple[LocalWorker, Message]]:
        """Block until a worker says something or is gone, or the time is over."""
        pipes = {handle.pipe: handle for handle in handles}
        sentinels = {handle.process.sentinel: handle for handle in handles}
        happened = wait([*pipes, *sentinels], timeout)
        touched = [
            h for h in handles if h.pipe in happened or h.process.sentinel in happened
        ]
        return [(handle, message) for handle in touched for message in _messages(handle)]

    def stop(self, handles: Sequence[LocalWorker]) -> None:
        """Kill processes; what they were writing was not to be seen before it is whole."""
        for handle in handles:
            handle.process.kill()
        for handle in handles:
            handle.process.join(DEATH_SECONDS)
            handle.pipe.close()
            if handle.process.exitcode is not None:
                handle.process.close()

    def close(self) -> None:
        """Nothing is held but the workers."""


def _messages(handle: LocalWorker) -> Iterator[Message]:
    """What a worker has said; the last word of one that is gone is heard as well."""
    try:
        while handle.pipe.poll():
            yield read_message(handle.pipe.recv_bytes())
        gone = not handle.process.is_alive()
    except (EOFError, OSError):
        gone = True
    if gone:
        handle.process.join(DEATH_SECONDS)  # its end of the pipe may go first
        yield Gone(_cause(handle.process.exitcode))


def _cause(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "it was killed by SIGKILL, perhaps because the memory ran out"
    if code is not None and code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    hint = ' (is the script that uses it below `if __name__ == "__main__":`?)'
    return f"it ended with exit code {code}" + (hint if code == 1 else "")


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let a process start with Ctrl-C blocked; it is the driver that acts on it."""
    resource_tracker.ensure_running()  # which lifts the block when it is started below
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in the worker ------------------------------------------------------------------------


def _serve(pipe: "Connection[bytes, bytes]", opening: bytes, place: Place) -> None:
    """Do what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_driver, daemon=True).start()
    work, message = open_work(opening, place)
    pipe.send_bytes(message)
    while work is not None:
        try:
            payload = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(do_work(work, payload))


def _end_with_driver() -> None:
    """Leave no orphan: a driver that is killed cannot tell its workers."""
    driver = parent_process()
    if driver is not None:
        wait([driver.sentinel])
        os._exit(1)

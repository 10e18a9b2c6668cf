"""Workers that are processes of this machine.

Each has its own pipe and sentinel. So a worker that dies, by SIGKILL or for lack of memory,
is noticed at once and does not harm the others. Only the driver handles Ctrl-C, and workers
end by themselves when the driver dies.
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
    Died,
    Message,
    Opening,
    WorkerSpec,
    do_work,
    open_work,
    read_message,
)
from layerwise.run.workers.pool import Pool

# A forked process would inherit locks of threads that it lacks, and could not use CUDA.
_CONTEXT = get_context("spawn")

# Seconds to wait for a process to end after SIGKILL.
DEATH_SECONDS = 10.0


def local_workers(
    opening: Opening, count: int, *, threads: int = 1, device: str = "auto"
) -> Pool["LocalWorker"]:
    """Executor on processes of this machine.

    Parameters
    ----------
    opening
        Called once in every worker, with its `WorkerSpec`; returns the function that does a
        job, given the payload of the job. It is pickled, so it must be a module-level
        function, or a `functools.partial` of one.
    count
        Number of workers. Each is started when there is a job for it.
    threads
        PyTorch threads in each worker.
    device
        "auto" assigns the visible GPUs to the workers in turn, or the CPU if there are
        none; anything else is a device that all workers share.

    Returns
    -------
    Pool
        Executor for `run_jobs`, which closes it.

    Notes
    -----
    A Python script must use workers below ``if __name__ == "__main__":``, because every
    worker imports the script.
    """
    specs = [WorkerSpec(i, _device(i, device), threads) for i in range(count)]
    return Pool(LocalBackend(opening), specs)


def _device(index: int, device: str) -> str:
    if device != "auto":
        return device
    gpus = torch.cuda.device_count()
    return f"cuda:{index % gpus}" if gpus else "cpu"


@dataclass(eq=False)
class LocalWorker:
    """A process, and the driver's end of its pipe."""

    process: SpawnProcess
    pipe: "Connection[bytes, bytes]"


class LocalBackend:
    """Starts processes and listens to them."""

    def __init__(self, opening: Opening) -> None:
        self._opening = pickle.dumps(opening)

    def launch(self, spec: WorkerSpec) -> LocalWorker:
        """Begin to start a process."""
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_serve,
            args=(theirs, self._opening, spec),
            name=f"layerwise-worker-{spec.index}",
            daemon=True,
        )
        with _without_interrupts(), contextlib.closing(theirs):
            process.start()
        return LocalWorker(process, ours)

    def send(self, handle: LocalWorker, payload: Any) -> None:
        """Send a payload to a worker that is ready and idle."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            handle.pipe.send_bytes(pickle.dumps(payload))

    def poll(
        self, handles: Sequence[LocalWorker], timeout: float | None
    ) -> list[tuple[LocalWorker, Message]]:
        """Block until a worker sends a message or dies, or the timeout passes."""
        pipes = {handle.pipe: handle for handle in handles}
        sentinels = {handle.process.sentinel: handle for handle in handles}
        happened = wait([*pipes, *sentinels], timeout)
        touched = [
            h for h in handles if h.pipe in happened or h.process.sentinel in happened
        ]
        return [(handle, message) for handle in touched for message in _messages(handle)]

    def stop(self, handles: Sequence[LocalWorker]) -> None:
        """Kill processes; they write files atomically, so no partial file appears."""
        for handle in handles:
            handle.process.kill()
        for handle in handles:
            handle.process.join(DEATH_SECONDS)
            handle.pipe.close()
            if handle.process.exitcode is not None:
                handle.process.close()

    def close(self) -> None:
        """Do nothing: the backend holds only the workers."""


def _messages(handle: LocalWorker) -> Iterator[Message]:
    """Messages of a worker, with the last ones of a worker that died."""
    try:
        while handle.pipe.poll():
            yield read_message(handle.pipe.recv_bytes())
        died = not handle.process.is_alive()
    except (EOFError, OSError):
        died = True
    if died:
        handle.process.join(DEATH_SECONDS)  # its end of the pipe may close earlier
        yield Died(_cause(handle.process.exitcode))


def _cause(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "it was killed by SIGKILL, perhaps because the memory ran out"
    if code is not None and code < 0:
        return f"it was killed by {signal.Signals(-code).name}"
    hint = ' (is the script that uses it below `if __name__ == "__main__":`?)'
    return f"it ended with exit code {code}" + (hint if code == 1 else "")


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start a process with Ctrl-C blocked, because only the driver handles it."""
    resource_tracker.ensure_running()  # started inside the block, it would unblock SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- in the worker ------------------------------------------------------------------------


def _serve(pipe: "Connection[bytes, bytes]", opening: bytes, spec: WorkerSpec) -> None:
    """Do the jobs that arrive through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_end_with_driver, daemon=True).start()
    work, message = open_work(opening, spec)
    pipe.send_bytes(message)
    while work is not None:
        try:
            payload = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(do_work(work, payload))


def _end_with_driver() -> None:
    """End the worker when the driver ends: a killed driver cannot stop its workers."""
    driver = parent_process()
    if driver is not None:
        wait([driver.sentinel])
        os._exit(1)

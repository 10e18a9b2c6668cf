"""Workers in slots: started when a job needs one, replaced when they die.

Local processes and Ray share this part. A backend starts one worker, sends it payloads and
receives its messages. The pool keeps the attempt of each worker, and decides what follows
from a worker's death.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from layerwise.errors import UsageError, WorkerError
from layerwise.run.workers.executor import Attempt, Done, Event, Failed, Lost
from layerwise.run.workers.messages import (
    Died,
    Message,
    NotReady,
    Raised,
    Ready,
    Returned,
    WorkerSpec,
)

# Starts of a worker before the run stops: two failures in a row may be bad luck.
STARTS = 3

# Seconds until a worker must be ready: opening a large model over a network takes minutes,
# and a cluster may have to find a machine first.
LONGEST_START = 1800.0

Handle = TypeVar("Handle")


class Backend(Protocol[Handle]):
    """Workers of one kind."""

    def launch(self, spec: WorkerSpec) -> Handle:
        """Begin to start a worker; it will report `Ready`."""
        ...

    def send(self, handle: Handle, payload: Any) -> None:
        """Send a payload to a ready worker; if it has died, `poll` will report that."""
        ...

    def poll(
        self, handles: Sequence[Handle], timeout: float | None
    ) -> list[tuple[Handle, Message]]:
        """Block until a worker sends a message or dies, or the timeout passes."""
        ...

    def stop(self, handles: Sequence[Handle]) -> None:
        """End workers at once, whatever they are doing."""
        ...

    def close(self) -> None:
        """Release the backend's own resources."""
        ...


@dataclass(eq=False)
class _Slot(Generic[Handle]):
    """A worker, if one is started, and its attempt."""

    spec: WorkerSpec
    handle: Handle | None = None
    ready: bool = False
    launched: float = 0.0
    failed_starts: int = 0
    attempt: Attempt | None = None
    payload: Any = None


class Pool(Generic[Handle]):
    """Executor on workers of a backend, one per spec."""

    def __init__(self, backend: Backend[Handle], specs: Sequence[WorkerSpec]) -> None:
        if not specs:
            message = "there must be at least one worker"
            raise UsageError(message)
        self._backend = backend
        self._slots = [_Slot[Handle](spec) for spec in specs]
        self._closed = False

    @property
    def slots(self) -> int:
        """Number of workers."""
        return len(self._slots)

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        return time.monotonic()

    def start(self, attempt: Attempt, payload: Any) -> None:
        """Hand an attempt to a ready worker, or start one for it."""
        free = [slot for slot in self._slots if slot.attempt is None]
        slot = max(free, key=lambda slot: slot.handle is not None)
        slot.attempt, slot.payload = attempt, payload
        if slot.handle is None:
            self._launch(slot)
        else:  # it is ready: a worker that is starting has an attempt
            self._backend.send(slot.handle, payload)

    def wait(self, timeout: float | None) -> list[Event]:
        """Block until there are events, or ``timeout`` seconds passed.

        Raises
        ------
        WorkerError or any other exception
            A worker could not be started three times in a row.
        """
        until = None if timeout is None else self.now() + timeout
        while True:
            left = None if until is None else max(0.0, until - self.now())
            handles = [slot.handle for slot in self._slots if slot.handle is not None]
            messages = self._backend.poll(handles, _smaller(left, self._until_late()))
            events = [event for one in messages for event in self._receive(*one)]
            self._end_late_starts()
            if events or (until is not None and self.now() >= until):
                return events

    def close(self) -> None:
        """End all workers, whatever they are doing. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._backend.stop([s.handle for s in self._slots if s.handle is not None])
        finally:
            self._backend.close()

    # -- one slot -------------------------------------------------------------------------

    def _launch(self, slot: _Slot[Handle]) -> None:
        slot.ready, slot.launched = False, self.now()
        slot.handle = self._backend.launch(slot.spec)

    def _receive(self, handle: Handle, message: Message) -> Iterator[Event]:
        slot = next((slot for slot in self._slots if slot.handle is handle), None)
        if slot is None:
            return  # this worker was already stopped
        attempt = slot.attempt
        match message:
            case Ready():
                slot.ready, slot.failed_starts = True, 0
                if attempt is not None:
                    self._backend.send(handle, slot.payload)
            case NotReady(error=error):
                self._fail_to_start(slot, error)
            case Died(reason=reason) if not slot.ready:
                self._fail_to_start(slot, _no_start(slot.spec, reason))
            case Died(reason=reason):
                self._drop(slot)
                slot.attempt = None
                if attempt is not None:
                    yield Lost(attempt, reason)
            case Returned(value=value) if attempt is not None:
                slot.attempt = None
                yield Done(attempt, value)
            case Raised(error=error) if attempt is not None:
                slot.attempt = None
                yield Failed(attempt, error)

    def _drop(self, slot: _Slot[Handle]) -> None:
        if slot.handle is not None:
            self._backend.stop([slot.handle])
        slot.handle, slot.ready = None, False

    def _fail_to_start(self, slot: _Slot[Handle], error: BaseException) -> None:
        """Start the worker again; its attempt is still waiting, so it is not lost."""
        self._drop(slot)
        slot.failed_starts += 1
        if slot.failed_starts >= STARTS:
            raise error
        if slot.attempt is not None:
            self._launch(slot)

    # -- workers that never start ---------------------------------------------------------

    def _starting(self) -> list[_Slot[Handle]]:
        return [slot for slot in self._slots if slot.handle is not None and not slot.ready]

    def _until_late(self) -> float | None:
        first = min((slot.launched for slot in self._starting()), default=None)
        return None if first is None else max(0.0, first + LONGEST_START - self.now())

    def _end_late_starts(self) -> None:
        for slot in self._starting():
            if self.now() - slot.launched >= LONGEST_START:
                reason = f"it was not ready after {LONGEST_START:.0f} s"
                self._fail_to_start(slot, _no_start(slot.spec, reason))


def _no_start(spec: WorkerSpec, reason: str) -> WorkerError:
    return WorkerError(f"worker {spec.index} did not start {STARTS} times: {reason}")


def _smaller(first: float | None, second: float | None) -> float | None:
    return min((x for x in (first, second) if x is not None), default=None)

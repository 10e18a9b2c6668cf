"""What a worker does, wherever it runs: build its context once, then answer payloads.

Values and errors cross as bytes that are pickled here, where a failure to do so belongs to
the job, and not by the transport, where it would look like a lost worker.
"""

import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from layerwise.errors import WorkerError

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class Place:
    """Where a worker runs.

    Parameters
    ----------
    index
        Number of the worker, from 0; one that replaces a lost one has the same.
    device
        PyTorch device that it has to itself, or "cpu".
    threads
        Threads of PyTorch on the CPU, already set.
    """

    index: int
    device: str
    threads: int


# Opens what all jobs need, and returns the function that does a job, given its payload.
Opening = Callable[[Place], Work]


@dataclass(frozen=True)
class Ready:
    """The worker has its context."""


@dataclass(frozen=True)
class NotReady:
    """The context could not be built; the worker is of no use."""

    error: BaseException


@dataclass(frozen=True)
class Returned:
    """The job returned a value."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """The job raised an error."""

    error: BaseException


@dataclass(frozen=True)
class Gone:
    """The worker is no more: not said by it, but by whoever watches it."""

    reason: str


Message = Ready | NotReady | Returned | Raised | Gone


def open_work(opening: bytes, place: Place) -> tuple[Work | None, bytes]:
    """Build the context of a worker, and the message that tells how that went."""
    try:
        torch.set_num_threads(place.threads)
        work: Work = pickle.loads(opening)(place)
        return work, pickle.dumps(Ready())
    except Exception as error:
        return None, pickle.dumps(NotReady(_portable(error)))


def do_work(work: Work, payload: bytes) -> bytes:
    """Message with what a job returned or raised."""
    try:
        return pickle.dumps(Returned(work(pickle.loads(payload))))
    except Exception as error:
        return pickle.dumps(Raised(_portable(error)))


def read_message(data: bytes) -> Message:
    """Message of a worker; a value that cannot be read is an error of its job."""
    try:
        message: Message = pickle.loads(data)
    except Exception as error:
        text = f"the value that a job returned cannot be read ({error}); return plain data"
        return Raised(WorkerError(text))
    return message


def _portable(error: Exception) -> Exception:
    """Return the error as the driver will see it, with its traceback as a note."""
    note = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is not type(error):
            raise TypeError
    except Exception:
        copy = WorkerError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in a worker:\n{note}")
    return copy  # type: ignore[no-any-return]

"""The two steps of every worker: build the context once, then answer payloads.

Values and errors are pickled here, so that an error of pickling is an error of the job. In
the transport it would look like a lost worker.
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
class WorkerSpec:
    """Number, device and threads of a worker.

    Parameters
    ----------
    index
        Number of the worker, from 0; a replacement has the number of the lost worker.
    device
        PyTorch device that no other worker uses, or "cpu".
    threads
        PyTorch threads on the CPU, already set.
    """

    index: int
    device: str
    threads: int


# Builds the context that all jobs need; returns the function from a payload to a result.
Opening = Callable[[WorkerSpec], Work]


@dataclass(frozen=True)
class Ready:
    """The worker has its context."""


@dataclass(frozen=True)
class NotReady:
    """The context could not be built; the worker cannot be used."""

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
class Died:
    """The worker died; reported by its backend, not by the worker."""

    reason: str


Message = Ready | NotReady | Returned | Raised | Died


def open_work(opening: bytes, spec: WorkerSpec) -> tuple[Work | None, bytes]:
    """Build the context of a worker; return its work function and `Ready` or `NotReady`."""
    try:
        torch.set_num_threads(spec.threads)
        work: Work = pickle.loads(opening)(spec)
        return work, pickle.dumps(Ready())
    except Exception as error:
        return None, pickle.dumps(NotReady(_portable(error)))


def do_work(work: Work, payload: bytes) -> bytes:
    """Message with the result or the error of a job."""
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
    """Return a picklable copy of an error, with its traceback as a note."""
    note = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
        if type(copy) is not type(error):
            raise TypeError
    except Exception:
        copy = WorkerError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in a worker:\n{note}")
    return copy  # type: ignore[no-any-return]

"""Words that the scheduler and what runs its jobs share: jobs, attempts, events.

A job is a pure function of files. What it makes is a file named after its content
that it writes atomically, and what it returns is small. So a job may run twice,
one after the other or at the same time, and nobody can tell afterwards: a scheduler may
try again whatever it is not sure about.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Key = int | str


@dataclass(frozen=True)
class Job:
    """One unit of work.

    Parameters
    ----------
    key
        Its name, unique within a run.
    payload
        What the worker gets to do it: small, and to be pickled. Paths, not tensors.
    """

    key: Key
    payload: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Attempt:
    """One start of a job: the first is number 0."""

    key: Key
    number: int


@dataclass(frozen=True)
class Done:
    """The attempt returned a value."""

    attempt: Attempt
    value: Any


@dataclass(frozen=True)
class Failed:
    """The attempt raised an error, which another attempt would raise as well."""

    attempt: Attempt
    error: BaseException


@dataclass(frozen=True)
class Lost:
    """The worker of the attempt is gone; what it did may or may not be finished."""

    attempt: Attempt
    reason: str


Event = Done | Failed | Lost


class Executor(Protocol):
    """Runs attempts on workers, and replaces workers that are lost.

    Every attempt that was started ends in one event. More of them, late ones and those
    that contradict each other are allowed: the scheduler believes the first result.
    """

    @property
    def slots(self) -> int:
        """Number of attempts that may be started and not ended at any time."""
        ...

    def start(self, attempt: Attempt, payload: Any) -> None:
        """Hand an attempt to a worker; returns at once."""
        ...

    def wait(self, timeout: float | None) -> Sequence[Event]:
        """Block until something happened or ``timeout`` seconds passed; None: no limit."""
        ...

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        ...

    def close(self) -> None:
        """End all workers, whatever they are doing. A second call does nothing."""
        ...

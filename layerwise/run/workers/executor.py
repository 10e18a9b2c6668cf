"""Types that the scheduler shares with its executors: jobs, attempts, events.

A job is a pure function of files. It writes its result atomically to a file named after
the content, and returns a small value. So a job may run twice, one after the other or at
the same time, with the same result: the scheduler may retry whatever it is not sure about.
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
        Input of the worker: small and picklable. Paths, not tensors.
    """

    key: Key
    payload: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Attempt:
    """One start of a job; the first has number 0."""

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
    """The worker of the attempt died; its work may or may not be finished."""

    attempt: Attempt
    reason: str


Event = Done | Failed | Lost


class Executor(Protocol):
    """Runs attempts on workers, and replaces workers that die.

    Every attempt that was started ends in at least one event. Late, repeated and
    contradictory events are allowed: the scheduler uses the first result.
    """

    @property
    def slots(self) -> int:
        """Number of attempts that may run at the same time."""
        ...

    def start(self, attempt: Attempt, payload: Any) -> None:
        """Hand an attempt to a worker, and return at once."""
        ...

    def wait(self, timeout: float | None) -> Sequence[Event]:
        """Block until there are events or ``timeout`` seconds passed; None: no limit."""
        ...

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        ...

    def close(self) -> None:
        """End all workers, whatever they are doing. A second call does nothing."""
        ...

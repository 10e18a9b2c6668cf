"""The scheduler decides when each job starts, and which jobs are retried.

A job whose worker is lost is retried. A job that takes far longer than the others is
started a second time on a worker that would otherwise idle. Only the first result of a job
counts. An error that a job raises ends the run: jobs are pure functions, so it would be
raised again. The scheduler itself starts no processes.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from layerwise.errors import UsageError, WorkerError
from layerwise.run.workers.executor import (
    Attempt,
    Done,
    Event,
    Executor,
    Failed,
    Job,
    Key,
    Lost,
)

# A timeout below the resolution of a clock would be a busy loop.
SHORTEST_WAIT = 0.001


@dataclass(frozen=True)
class Rules:
    """Rules for retrying a job.

    Parameters
    ----------
    retries
        How often the worker of one job may be lost before the run stops.
    look_ahead
        Jobs that are taken from the iterator before a slot is free for them.
    straggler_factor
        A job is late when it runs this many times the median of the finished jobs...
    straggler_seconds
        ...and at least this long, which allows for the start of a worker.
    """

    retries: int = 3
    look_ahead: int = 2
    straggler_factor: float = 3.0
    straggler_seconds: float = 30.0

    def __post_init__(self) -> None:
        if min(self.retries, self.look_ahead) < 0:
            message = (
                f"retries and look_ahead must be at least 0, not {self.retries} and "
                f"{self.look_ahead}"
            )
            raise UsageError(message)
        if not self.straggler_factor > 1 or not self.straggler_seconds >= 0:
            message = "straggler_factor must be above 1, straggler_seconds at least 0"
            raise UsageError(message)


def run_jobs(
    jobs: Iterable[Job],
    executor: Executor,
    *,
    on_done: Callable[[Job, Any], None],
    rules: Rules | None = None,
    on_note: Callable[[str], None] | None = None,
) -> None:
    """Run independent jobs, and close the executor in any case.

    Parameters
    ----------
    jobs
        Consumed lazily, in this thread: at most ``executor.slots + rules.look_ahead``
        jobs are taken from it and not yet done. Producing a job may be slow.
    executor
        Workers that nothing else uses.
    on_done
        Called exactly once per job, in the order of completion, with the result.
    rules
        Rules for retrying a job; None: the defaults.
    on_note
        Called with one line, cause included, for every job that is started again.

    Raises
    ------
    LayerwiseError or any other exception
        A job raised it. Running jobs are finished and delivered first.
    WorkerError
        The worker of one job was lost more than ``rules.retries`` times, or all workers
        are lost again and again while no job is finished.
    UsageError
        Two jobs have the same key.

    Notes
    -----
    An exception from ``jobs``, ``on_done`` or a signal (Ctrl-C, ``Interrupted``) ends the
    run at once: running jobs are stopped, and nothing else is delivered.
    """
    try:
        _Run(jobs, executor, on_done, rules or Rules(), on_note or _ignore).run()
    finally:
        executor.close()


def _ignore(text: str) -> None:
    """Drop a note."""


@dataclass
class _OpenJob:
    """A job that was taken from the iterator and is not done."""

    job: Job
    attempts: int = 0
    losses: int = 0
    running: set[Attempt] = field(default_factory=set)


class _Run:
    """State of one call of `run_jobs`."""

    def __init__(
        self,
        jobs: Iterable[Job],
        executor: Executor,
        on_done: Callable[[Job, Any], None],
        rules: Rules,
        note: Callable[[str], None],
    ) -> None:
        self._jobs = iter(jobs)
        self._executor = executor
        self._on_done = on_done
        self._rules = rules
        self._note = note
        self._exhausted = False
        self._open: dict[Key, _OpenJob] = {}
        self._done: set[Key] = set()
        self._waiting: deque[Key] = deque()
        self._running: dict[Attempt, float] = {}  # start time of each attempt
        self._seconds: list[float] = []  # duration of each finished job
        self._losses_in_a_row = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        while not self._finished():
            self._start_waiting()
            if self._takes_another():
                self._take()
                timeout: float | None = 0.0  # only events that have already arrived
            else:
                timeout = self._start_stragglers_again()
            for event in self._executor.wait(timeout):
                self._handle(event)
        if self._error is not None:
            raise self._error

    def _finished(self) -> bool:
        if self._error is not None:
            return not self._running
        return self._exhausted and not self._open

    # -- starting -------------------------------------------------------------------------

    def _idle(self) -> int:
        return self._executor.slots - len(self._running)

    def _takes_another(self) -> bool:
        if self._exhausted or self._error is not None:
            return False
        return len(self._open) < self._executor.slots + self._rules.look_ahead

    def _take(self) -> None:
        job = next(self._jobs, None)
        if job is None:
            self._exhausted = True
            return
        if job.key in self._open or job.key in self._done:
            message = f"two jobs have the key {job.key}; give each job its own key"
            raise UsageError(message)
        self._open[job.key] = _OpenJob(job)
        self._waiting.append(job.key)

    def _start_waiting(self) -> None:
        while self._waiting and self._idle() and self._error is None:
            self._start(self._open[self._waiting.popleft()])

    def _start(self, entry: _OpenJob) -> None:
        attempt = Attempt(entry.job.key, entry.attempts)
        entry.attempts += 1
        entry.running.add(attempt)
        self._running[attempt] = self._executor.now()
        self._executor.start(attempt, entry.job.payload)

    def _start_stragglers_again(self) -> float | None:
        """Use slots that would idle; return the seconds until the next job is late."""
        if not self._seconds or self._error is not None:
            return None
        typical = median(self._seconds)
        late = max(self._rules.straggler_factor * typical, self._rules.straggler_seconds)
        now = self._executor.now()
        for attempt, since in list(self._running.items()):  # the oldest first
            entry = self._open.get(attempt.key)
            if not self._idle():
                return None
            if entry is None or len(entry.running) > 1:
                continue  # it is done, or was already started again
            if now - since < late:
                return max(late - (now - since), SHORTEST_WAIT)
            self._note(
                f"job {attempt.key} runs for {now - since:.0f} s, the median is "
                f"{typical:.0f} s: started a second time"
            )
            self._start(entry)
        return None

    # -- events ---------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        attempt = event.attempt
        since = self._running.pop(attempt, None)
        entry = self._open.get(attempt.key)
        if entry is None:
            return  # the job is already done
        entry.running.discard(attempt)
        match event:
            case Done(value=value):
                self._finish(entry, since, value)
            case Failed(error=error):
                self._stop(error, f"job {attempt.key} failed: {error}")
            case Lost(reason=reason) if since is not None:
                self._lose(entry, reason)
            case Lost():
                pass  # reported twice

    def _finish(self, entry: _OpenJob, since: float | None, value: Any) -> None:
        key = entry.job.key
        del self._open[key]
        self._done.add(key)
        if key in self._waiting:  # it was reported lost, but its result arrived later
            self._waiting.remove(key)
        if since is not None:
            self._seconds.append(self._executor.now() - since)
        self._losses_in_a_row = 0
        self._on_done(entry.job, value)

    def _lose(self, entry: _OpenJob, reason: str) -> None:
        key = entry.job.key
        entry.losses += 1
        self._losses_in_a_row += 1
        if self._error is not None or entry.running:
            return  # no longer needed, or still running on another worker
        limit = self._rules.retries
        if entry.losses > limit:
            message = (
                f"job {key} lost its worker {entry.losses} times, the last time because "
                f"{reason}; give each worker more memory, or use fewer workers"
            )
            self._stop(WorkerError(message), message)
        elif self._losses_in_a_row > max(limit, 2 * self._executor.slots):
            message = (
                f"{self._losses_in_a_row} workers in a row were lost and no job was "
                f"finished, the last because {reason}; check the machines of the workers"
            )
            raise WorkerError(message)
        else:
            self._note(f"job {key} lost its worker ({reason}): retrying")
            self._waiting.appendleft(key)

    def _stop(self, error: BaseException, message: str) -> None:
        """Start no more jobs; the error is raised when all running jobs have ended."""
        if self._error is not None:
            return
        self._error = error
        if self._running:
            self._note(f"{message}; {len(self._running)} running jobs are finished first")

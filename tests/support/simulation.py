"""Workers in virtual time, for tests of the scheduler: they die, are slow, and repeat."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from layerwise.run.workers.executor import Attempt, Done, Event, Failed, Key, Lost


@dataclass
class Faults:
    """Faults of the workers; rates are per second, and by default there are none."""

    death_rate: float = 0.0  # of each worker
    seconds_down: float = 30.0  # on average, until a worker is back
    mass_death: tuple[float, float] | None = None  # all die once between these times
    slow: dict[int, float] = field(default_factory=dict)  # worker: times slower
    repeats: float = 0.0  # share of the results that come again, later
    late: float = 0.0  # share of the lost attempts whose result arrives nevertheless


@dataclass
class Worker:
    alive: bool = True
    generation: int = 0
    attempt: Attempt | None = None


class Simulation:
    """Executor whose clock jumps from event to event.

    Parameters
    ----------
    seconds
        Running time of every job on a good worker.
    compute
        What a job returns, or raises.
    horizon
        Limit of the virtual time; a wait that reaches it counts as a hang.
    """

    def __init__(
        self,
        slots: int,
        seconds: dict[Key, float],
        compute: Callable[[Any], Any],
        *,
        seed: int = 0,
        horizon: float = 1e6,
        faults: Faults | None = None,
    ) -> None:
        self._slots, self._seconds, self._compute = slots, seconds, compute
        self._horizon, self._faults = horizon, faults or Faults()
        self._random = random.Random(seed)
        self._time = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._workers = [Worker() for _ in range(slots)]
        self._queue: deque[tuple[Attempt, Any]] = deque()
        self._occupied: set[Attempt] = set()
        self._outbox: list[Event] = []
        self.starts: list[Attempt] = []
        self.n_deaths = 0
        self.closed = False
        for index in range(slots):
            self._schedule_death(index)
            if self._faults.mass_death is not None:
                self._at(self._random.uniform(*self._faults.mass_death), self._die, index)

    # -- the protocol ---------------------------------------------------------------------

    @property
    def slots(self) -> int:
        return self._slots

    def start(self, attempt: Attempt, payload: Any) -> None:
        assert not self.closed
        assert attempt not in self._occupied
        self.starts.append(attempt)
        self._occupied.add(attempt)
        assert len(self._occupied) <= self._slots
        self._queue.append((attempt, payload))
        self._assign()

    def wait(self, timeout: float | None) -> list[Event]:
        assert not self.closed
        until = self._horizon if timeout is None else self._time + timeout
        while not self._outbox and self._agenda and self._agenda[0][0] <= until:
            self._time, _, happen = heapq.heappop(self._agenda)
            happen()
        if not self._outbox:
            assert until < self._horizon, "nothing happens any more: a hang"
            self._time = until
        events, self._outbox = self._outbox, []
        self._random.shuffle(events)
        self._occupied -= {event.attempt for event in events}
        return events

    def now(self) -> float:
        return self._time

    def close(self) -> None:
        self.closed = True

    # -- for the tests --------------------------------------------------------------------

    def spend(self, seconds: float) -> None:
        """Let the driver be busy while events happen."""
        until = self._time + seconds
        while self._agenda and self._agenda[0][0] <= until:
            self._time, _, happen = heapq.heappop(self._agenda)
            happen()
        self._time = until

    # -- the life of workers --------------------------------------------------------------

    def _at(self, time: float, happen: Callable[..., None], *arguments: Any) -> None:
        entry = (time, next(self._order), lambda: happen(*arguments))
        heapq.heappush(self._agenda, entry)

    def _after(self, seconds: float, happen: Callable[..., None], *arguments: Any) -> None:
        self._at(self._time + seconds, happen, *arguments)

    def _deliver(self, event: Event) -> None:
        self._outbox.append(event)

    def _schedule_death(self, index: int) -> None:
        if self._faults.death_rate:
            generation = self._workers[index].generation
            seconds = self._random.expovariate(self._faults.death_rate)
            self._after(seconds, self._die, index, generation)

    def _assign(self) -> None:
        idle = [i for i, w in enumerate(self._workers) if w.alive and w.attempt is None]
        self._random.shuffle(idle)
        while idle and self._queue:
            index, (attempt, payload) = idle.pop(), self._queue.popleft()
            worker = self._workers[index]
            worker.attempt = attempt
            took = self._seconds[attempt.key] * self._faults.slow.get(index, 1.0)
            self._after(took, self._finish, index, worker.generation, attempt, payload)

    def _finish(self, index: int, generation: int, attempt: Attempt, payload: Any) -> None:
        worker = self._workers[index]
        late = worker.generation != generation
        if late and self._random.random() >= self._faults.late:
            return
        event: Event
        try:
            event = Done(attempt, self._compute(payload))
        except Exception as error:
            event = Failed(attempt, error)
        self._deliver(event)
        if self._random.random() < self._faults.repeats:
            self._after(self._random.uniform(0, 60), self._deliver, event)
        if not late:
            worker.attempt = None
            self._assign()

    def _die(self, index: int, generation: int | None = None) -> None:
        worker = self._workers[index]
        if not worker.alive or generation not in (None, worker.generation):
            return
        self.n_deaths += 1
        if worker.attempt is not None:
            lost = Lost(worker.attempt, "the machine failed")
            self._after(self._random.random(), self._deliver, lost)
        worker.alive, worker.attempt = False, None
        worker.generation += 1
        mean = self._faults.seconds_down
        down = self._random.expovariate(1 / mean) if mean else 0.0
        self._after(down, self._revive, index)

    def _revive(self, index: int) -> None:
        self._workers[index].alive = True
        self._schedule_death(index)
        self._assign()

"""The scheduler, in virtual time: every job once, whatever happens to the workers."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from layerwise.errors import DataError, Interrupted, SolveError, UsageError, WorkerError
from layerwise.run.workers.executor import Attempt, Done, Event, Failed, Job, Key, Lost
from layerwise.run.workers.schedule import Rules, run_jobs
from tests.support.simulation import Faults, Simulation

N_WORKERS, N_JOBS = 64, 500
SEEDS = range(20)
PATIENT = Rules(straggler_factor=1e9)


def square(payload: Any) -> Any:
    return payload * payload


def heavy_tail(seed: int, n_jobs: int = N_JOBS) -> dict[Key, float]:
    """Seconds per job: most take ten, a few take minutes."""
    generator = random.Random(seed)
    return {key: min(10 * generator.paretovariate(1.5), 600) for key in range(n_jobs)}


class Producer:
    """Jobs one by one, and how many of them were taken and not done at the worst time."""

    def __init__(self, simulation: Simulation, keys: Sequence[Key], seconds: float) -> None:
        self._simulation, self._keys, self._seconds = simulation, keys, seconds
        self.results: dict[Key, Any] = {}
        self.taken, self.most_open = 0, 0

    def jobs(self) -> Iterator[Job]:
        for key in self._keys:
            self._simulation.spend(self._seconds)
            self.taken += 1
            self.most_open = max(self.most_open, self.taken - len(self.results))
            yield Job(key, key)

    def on_done(self, job: Job, value: Any) -> None:
        assert job.key not in self.results
        self.results[job.key] = value


def ideal(seconds: dict[Key, float]) -> float:
    """No schedule is shorter than the larger of the two, and a list schedule than both."""
    return sum(seconds.values()) / N_WORKERS + max(seconds.values())


def simulate(
    seed: int, faults: Faults, rules: Rules, produce_seconds: float = 0.05
) -> tuple[Simulation, dict[Key, float]]:
    seconds = heavy_tail(seed)
    simulation = Simulation(
        N_WORKERS, seconds, square, seed=seed, horizon=50 * ideal(seconds), faults=faults
    )
    producer = Producer(simulation, list(seconds), produce_seconds)
    run_jobs(producer.jobs(), simulation, on_done=producer.on_done, rules=rules)
    assert producer.results == {key: square(key) for key in seconds}
    assert producer.most_open <= N_WORKERS + rules.look_ahead
    assert simulation.closed
    assert len(set(simulation.starts)) == len(simulation.starts)
    starts = Counter(attempt.key for attempt in simulation.starts)
    assert max(starts.values()) <= 2 + rules.retries
    return simulation, seconds


@pytest.mark.parametrize("seed", SEEDS)
def test_good_workers_run_every_job_once(seed: int) -> None:
    simulation, seconds = simulate(seed, Faults(), PATIENT)
    assert len(simulation.starts) == N_JOBS
    produced = 0.05 * N_JOBS
    assert simulation.now() <= ideal(seconds) + produced


@pytest.mark.parametrize("seed", SEEDS)
def test_dying_workers(seed: int) -> None:
    """Each dies every ten minutes, and all of them within one minute as well."""
    faults = Faults(death_rate=1 / 600, mass_death=(60, 120), repeats=0.2, late=0.3)
    simulation, seconds = simulate(seed, faults, Rules(retries=10))
    assert simulation.n_deaths >= N_WORKERS
    assert simulation.now() <= 3 * ideal(seconds)


@pytest.mark.parametrize("seed", SEEDS)
def test_stragglers_fifty_times_slower(seed: int) -> None:
    slow = {index: 50.0 for index in range(6)}
    simulation, seconds = simulate(seed, Faults(slow=slow, repeats=0.1), Rules())
    assert simulation.now() <= 1.5 * ideal(seconds)


@pytest.mark.parametrize("seed", SEEDS)
def test_everything_at_once(seed: int) -> None:
    faults = Faults(
        death_rate=1 / 300,
        mass_death=(30, 90),
        slow={index: 50.0 for index in range(6)},
        repeats=0.3,
        late=0.5,
    )
    simulation, seconds = simulate(seed, faults, Rules(retries=20))
    assert simulation.now() <= 3 * ideal(seconds)


def test_without_second_starts_stragglers_decide_the_time() -> None:
    """The bound of the test above is not met by chance."""
    slow = {index: 50.0 for index in range(6)}
    simulation, seconds = simulate(1, Faults(slow=slow), PATIENT)
    assert simulation.now() > 2 * ideal(seconds)


# --- single events -----------------------------------------------------------------------


class Script:
    """Executor with scripted events: one list per call of `wait`."""

    def __init__(self, slots: int, script: Sequence[list[Event] | BaseException]) -> None:
        self._slots, self._script = slots, list(script)
        self.starts: list[Attempt] = []
        self.timeouts: list[float | None] = []
        self.n_closed = 0
        self._time = 0.0

    @property
    def slots(self) -> int:
        return self._slots

    def start(self, attempt: Attempt, payload: Any) -> None:
        self.starts.append(attempt)

    def wait(self, timeout: float | None) -> list[Event]:
        if timeout == 0:
            return []
        self.timeouts.append(timeout)
        assert self._script, "nothing happens any more: a hang"
        events = self._script.pop(0)
        if isinstance(events, BaseException):
            raise events
        self._time += timeout or 100.0 if not events else 100.0
        return events

    def now(self) -> float:
        return self._time

    def close(self) -> None:
        self.n_closed += 1


A, B, C = Attempt("a", 0), Attempt("b", 0), Attempt("c", 0)
A_AGAIN = Attempt("a", 1)


def run_script(
    script: Script, keys: str, rules: Rules = PATIENT, **options: Any
) -> list[tuple[Key, Any]]:
    done: list[tuple[Key, Any]] = []
    jobs, options["rules"] = map(Job, keys), rules
    run_jobs(
        jobs, script, on_done=lambda job, value: done.append((job.key, value)), **options
    )
    assert script.n_closed == 1
    return done


def test_results_come_in_the_order_of_completion() -> None:
    script = Script(2, [[Done(B, 2)], [Done(A, 1), Done(C, 3)]])
    assert run_script(script, "abc") == [("b", 2), ("a", 1), ("c", 3)]
    assert script.starts == [A, B, C]


def test_no_jobs() -> None:
    assert run_script(Script(2, []), "") == []


def test_late_and_repeated_results_are_ignored() -> None:
    late: list[Event] = [Done(A, 5), Failed(A, ValueError()), Lost(A, "of old age")]
    script = Script(2, [[Done(A, 1), Done(A, 1)], late, [Done(B, 2)]])
    assert run_script(script, "ab") == [("a", 1), ("b", 2)]
    assert script.starts == [A, B]


def test_lost_job_is_tried_again_and_noted() -> None:
    notes: list[str] = []
    script = Script(1, [[Lost(A, "of a power cut")], [Done(A_AGAIN, 1)], [Done(B, 2)]])
    assert run_script(script, "ab", on_note=notes.append) == [("a", 1), ("b", 2)]
    assert script.starts == [A, A_AGAIN, B]
    assert notes == ["job a lost its worker (of a power cut): retrying"]


def test_result_of_a_lost_attempt_saves_the_second() -> None:
    """The loss and the result arrive together: nothing is left to start."""
    script = Script(1, [[Lost(A, "of silence"), Done(A, 1)], [Done(B, 2)]])
    assert run_script(script, "ab") == [("a", 1), ("b", 2)]
    assert script.starts == [A, B]


def test_a_loss_that_is_said_twice_counts_once() -> None:
    script = Script(2, [[Lost(A, ""), Lost(A, "")], [Done(A_AGAIN, 1), Done(B, 2)]])
    assert run_script(script, "ab", rules=Rules(retries=1)) == [("a", 1), ("b", 2)]
    assert script.starts == [A, B, A_AGAIN]


def test_job_that_kills_its_workers_is_named() -> None:
    losses: list[list[Event]] = [
        [Lost(Attempt("a", number), "of SIGKILL")] for number in range(4)
    ]
    script = Script(2, [*losses[:2], [Done(B, 2)], *losses[2:]])
    done: list[Key] = []
    with pytest.raises(WorkerError, match=r"job a lost its worker 4 times.*of SIGKILL"):
        run_jobs([Job("a"), Job("b")], script, on_done=lambda job, _: done.append(job.key))
    assert done == ["b"]
    assert script.n_closed == 1


def test_jobs_that_run_are_finished_before_a_lost_cause_is_raised() -> None:
    script = Script(2, [[Lost(A, "")], [Done(B, 2)]])
    done: list[Key] = []
    jobs = [Job("a"), Job("b"), Job("c")]
    with pytest.raises(WorkerError, match="job a lost its worker 1 times"):
        run_jobs(
            jobs,
            script,
            on_done=lambda job, _: done.append(job.key),
            rules=Rules(retries=0),
        )
    assert done == ["b"]
    assert script.starts == [A, B]


def test_workers_that_die_without_any_progress_end_the_run() -> None:
    """64 workers may die at once; 64 that die again and again end the run."""
    seconds: dict[Key, float] = dict.fromkeys(range(N_JOBS), 100.0)
    faults = Faults(death_rate=1 / 10, seconds_down=0)
    simulation = Simulation(N_WORKERS, seconds, square, horizon=1e4, faults=faults)
    with pytest.raises(WorkerError, match=r"129 workers in a row.*the machine failed"):
        run_jobs(
            map(Job, seconds), simulation, on_done=lambda *_: None, rules=Rules(retries=20)
        )
    assert simulation.closed


def test_error_of_a_job_keeps_its_type_and_stops_the_run() -> None:
    error = SolveError("layer 3 has no answer")
    notes: list[str] = []
    script = Script(2, [[Failed(B, error)], [Done(A, 1)]])
    done: list[Key] = []
    with pytest.raises(SolveError, match="layer 3 has no answer") as caught:
        run_jobs(
            map(Job, "abc"),
            script,
            on_done=lambda job, _: done.append(job.key),
            on_note=notes.append,
        )
    assert caught.value is error
    assert done == ["a"]  # it was running
    assert script.starts == [A, B]
    assert script.n_closed == 1
    assert notes == [
        "job b failed: layer 3 has no answer; 1 running jobs are finished first"
    ]


def test_after_an_error_nothing_is_started_and_the_first_is_raised() -> None:
    taken: list[str] = []
    notes: list[str] = []

    def jobs() -> Iterator[Job]:
        for key in "abcdef":
            taken.append(key)
            yield Job(key)

    last = Failed(Attempt("d", 0), DataError("d"))
    script = Script(4, [[Failed(B, DataError("b"))], [Lost(A, ""), Done(C, 3)], [last]])
    rules = Rules(look_ahead=0)
    with pytest.raises(DataError, match="b"):
        run_jobs(jobs(), script, on_done=lambda *_: None, rules=rules, on_note=notes.append)
    assert taken == ["a", "b", "c", "d"]
    assert script.starts == [A, B, C, last.attempt]
    assert notes == ["job b failed: b; 3 running jobs are finished first"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted("stopped")])
def test_an_interruption_closes_the_executor(error: BaseException) -> None:
    script = Script(2, [[Done(A, 1)], error])
    with pytest.raises(type(error)):
        run_jobs(map(Job, "abc"), script, on_done=lambda job, value: None)
    assert script.n_closed == 1


def test_an_error_of_the_driver_closes_the_executor() -> None:
    stopped, exhausted = Interrupted("disk full"), DataError("no more inputs")

    def stop(job: Job, value: Any) -> None:
        raise stopped

    def broken() -> Iterator[Job]:
        yield Job("a")
        raise exhausted

    script = Script(2, [[Done(A, 1)]])
    with pytest.raises(Interrupted, match="disk full"):
        run_jobs(map(Job, "abc"), script, on_done=stop)
    assert script.n_closed == 1
    script = Script(2, [])
    with pytest.raises(DataError, match="no more inputs"):
        run_jobs(broken(), script, on_done=stop)
    assert script.n_closed == 1


def test_two_jobs_of_one_key_are_refused() -> None:
    with pytest.raises(UsageError, match="two jobs have the key a"):
        run_script(Script(2, []), "aba")
    with pytest.raises(UsageError, match="two jobs have the key a"):
        run_script(Script(1, [[Done(A, 1)]]), "aa", rules=Rules(look_ahead=0))


@pytest.mark.parametrize("look_ahead", [0, 1, 3])
def test_jobs_are_taken_as_late_as_possible(look_ahead: int) -> None:
    taken: list[str] = []

    def jobs() -> Iterator[Job]:
        for key in "abcdefgh":
            taken.append(key)
            yield Job(key)

    script = Script(2, [[Done(A, 1)], KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        run_jobs(
            jobs(), script, on_done=lambda job, _: None, rules=Rules(look_ahead=look_ahead)
        )
    assert len(taken) == 1 + 2 + look_ahead


# --- stragglers --------------------------------------------------------------------------


def test_straggler_is_started_again_and_the_first_result_wins() -> None:
    """Median 100 s: `a` is late after 300 s, its second start wins, the first is stale."""
    notes: list[str] = []
    script = Script(2, [[Done(B, 2)], [], [Done(A_AGAIN, 7)]])
    result = run_script(script, "ab", Rules(), on_note=notes.append)
    assert result == [("b", 2), ("a", 7)]
    assert script.timeouts == [None, 200.0, None]
    assert script.starts == [A, B, A_AGAIN]
    assert notes == [
        "job a runs for 300 s, the median is 100 s: started a second time",
    ]


def test_straggler_that_wins_after_all() -> None:
    script = Script(2, [[Done(B, 2)], [], [Done(A, 1), Done(A_AGAIN, 7)]])
    assert run_script(script, "ab", Rules()) == [("b", 2), ("a", 1)]
    assert script.starts == [A, B, A_AGAIN]


def test_straggler_waits_for_jobs_that_were_never_started() -> None:
    last = Attempt("d", 0)
    script = Script(2, [[Done(B, 2)], [Done(C, 3)], [Done(last, 4)], [Done(A_AGAIN, 1)]])
    assert len(run_script(script, "abcd", Rules())) == 4
    assert script.starts == [A, B, C, last, A_AGAIN]


def test_loss_of_one_of_two_attempts_is_no_reason_for_a_third() -> None:
    script = Script(2, [[Done(B, 2)], [], [Lost(A, "")], [Done(A_AGAIN, 7)]])
    rules = Rules(straggler_factor=30, straggler_seconds=0)
    assert run_script(script, "ab", rules=rules) == [("b", 2), ("a", 7)]
    assert script.starts == [A, B, A_AGAIN]


def test_a_short_job_is_no_straggler() -> None:
    script = Script(2, [[Done(B, 2)], [Done(A, 1)]])
    run_script(script, "ab", rules=Rules(straggler_seconds=1000))
    assert script.timeouts == [None, 900.0]


@pytest.mark.parametrize(
    "options",
    [
        {"retries": -1},
        {"look_ahead": -1},
        {"straggler_factor": 1.0},
        {"straggler_factor": float("nan")},
        {"straggler_seconds": -1.0},
    ],
)
def test_impossible_rules_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Rules(**options)

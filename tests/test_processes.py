"""Workers that are processes: results, deaths, errors, and nothing left behind."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import DataError, SolveError, UsageError, WorkerError
from layerwise.run.workers import pool as pool_module
from layerwise.run.workers.executor import Attempt, Done, Event, Failed, Job, Lost
from layerwise.run.workers.messages import (
    Died,
    Message,
    NotReady,
    Raised,
    Ready,
    Returned,
    WorkerSpec,
)
from layerwise.run.workers.pool import LONGEST_START, Pool
from layerwise.run.workers.processes import LocalBackend, LocalWorker, _cause, local_workers
from layerwise.run.workers.schedule import Rules, run_jobs
from tests.support import worker_jobs

ROOT = Path(__file__).parents[1]
A, B = Attempt("a", 0), Attempt("b", 0)


def run_all(
    executor: Pool[LocalWorker], payloads: Sequence[Any], **options: Any
) -> list[Any]:
    values: dict[int | str, Any] = {}
    jobs = (Job(key, payload) for key, payload in enumerate(payloads))
    run_jobs(
        jobs,
        executor,
        on_done=lambda job, value: values.update({job.key: value}),
        **options,
    )
    return [values[key] for key in range(len(payloads))]


# --- real processes ----------------------------------------------------------------------


@pytest.mark.slow
def test_results_of_two_workers() -> None:
    patient = Rules(straggler_factor=1e9)  # with a worker that takes long to start
    executor = local_workers(worker_jobs.squares, 2, threads=2)
    results = run_all(executor, range(12), rules=patient)
    assert [result["value"] for result in results] == [number**2 for number in range(12)]
    assert all(result["same"] and result["threads"] == 2 for result in results)
    pids = {result["spec"].index: result["pid"] for result in results}
    assert len(set(pids.values()) - {os.getpid()}) == len(pids) == 2
    assert not any(alive(pid) for pid in pids.values())


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_killed_worker_is_noticed_and_its_job_done_by_another(tmp_path: Path) -> None:
    noticed: list[float] = []
    executor = local_workers(worker_jobs.suicides, 1)
    (death,) = run_all(
        executor,
        [str(tmp_path / "flag")],
        on_note=lambda text: noticed.append(time.monotonic()),
    )
    assert len(noticed) == 1
    assert 0 <= noticed[0] - death < 5  # next to nothing, on a machine that is not busy


@pytest.mark.slow
def test_what_one_worker_says() -> None:
    """One test for all, as a process is slow to start."""
    executor = local_workers(worker_jobs.troubles, 1)
    try:
        error = _error(executor, "solve error")
        assert type(error) is SolveError
        assert str(error) == "layer 3 has no answer"
        (note,) = error.__notes__
        assert "in work" in note
        # what cannot cross is an error of the job, and no lost worker
        assert "Fickle: layer 3 is moody" in str(_error(executor, "fickle"))
        assert "local object" in str(_error(executor, "local"))
        assert "that a job returned cannot be read" in str(_error(executor, "unreadable"))
        assert "no number" in str(_error(executor, worker_jobs.Unreadable()))
        # and Ctrl-C is a matter of the driver
        assert _outcome(executor, "ctrl-c") == Done(A, "ctrl-c")
    finally:
        executor.close()


def test_ctrl_c_cannot_break_a_worker_that_starts() -> None:
    """Python would raise in the middle of its imports, where no handler is set yet."""
    backend = LocalBackend(worker_jobs.squares)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    worker = backend.launch(WorkerSpec(0, "cpu", 1))
    try:
        status = Path(f"/proc/{worker.process.pid}/status").read_text()
        (blocked,) = re.findall(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
        assert int(blocked, 16) >> (signal.SIGINT - 1) & 1
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
    finally:
        backend.stop([worker])


def _outcome(executor: Pool[LocalWorker], payload: Any) -> Event:
    executor.start(A, payload)
    (event,) = executor.wait(60)
    return event


def _error(executor: Pool[LocalWorker], payload: Any) -> BaseException:
    event = _outcome(executor, payload)
    assert isinstance(event, Failed)
    return event.error


@pytest.mark.slow
def test_worker_that_cannot_open_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STARTS", 1)
    with pytest.raises(DataError, match="the model folder is gone") as caught:
        run_all(local_workers(worker_jobs.closed_shop, 1), [1, 2, 3])
    assert "in closed_shop" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-9, "it was killed by SIGKILL, perhaps because the memory ran out"),
        (-11, "it was killed by SIGSEGV"),
        (1, "it ended with exit code 1 (is the script that uses it below `if __name__ =="),
        (3, "it ended with exit code 3"),
    ],
)
def test_the_cause_of_a_death_is_said(code: int, message: str) -> None:
    assert _cause(code).startswith(message)


DRIVER = """
import signal
import sys
from layerwise.run.workers.executor import Job
from layerwise.run.workers.processes import local_workers
from layerwise.run.workers.schedule import run_jobs
from tests.support.worker_jobs import sleepers

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it
    jobs = [Job(key, sys.argv[1]) for key in range(4)]
    run_jobs(jobs, local_workers(sleepers, 1), on_done=print)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_the_end_of_the_driver_is_the_end_of_its_workers(tmp_path: Path, end: int) -> None:
    """Killed, it cannot tell them; Ctrl-C reaches all of them at once, and says so once."""
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with driver:
        until = time.monotonic() + 120
        while not (found := list(tmp_path.glob("*.pid"))):
            assert time.monotonic() < until
            assert driver.poll() is None
            time.sleep(0.05)
        workers = [int(path.stem) for path in found]
        assert all(alive(pid) for pid in workers)
        if end == signal.SIGKILL:
            driver.kill()
        else:
            os.killpg(driver.pid, end)
        until = time.monotonic() + 5
        while any(alive(pid) for pid in workers):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert driver.wait(20) == -end
        assert driver.stderr is not None
        assert driver.stderr.read().count("KeyboardInterrupt") == (end == signal.SIGINT)


# --- the pool, on scripted workers -------------------------------------------------------


class Puppets:
    """Backend whose workers are numbers, with messages from a script."""

    def __init__(self) -> None:
        self.launched: list[WorkerSpec] = []
        self.handles: dict[str, str] = {}
        self.sent: list[tuple[str, Any]] = []
        self.stopped: list[str] = []
        self.timeouts: list[float | None] = []
        self.says: list[list[tuple[str, Message]]] = []
        self.n_closed = 0

    def launch(self, spec: WorkerSpec) -> str:
        self.launched.append(spec)
        name = f"worker {len(self.launched)}"
        self.handles[name] = name
        return name

    def send(self, handle: str, payload: Any) -> None:
        self.sent.append((handle, payload))

    def poll(
        self, handles: Sequence[str], timeout: float | None
    ) -> list[tuple[str, Message]]:
        self.timeouts.append(timeout)
        said = self.says.pop(0) if self.says else []
        return [(self.handles[name], message) for name, message in said]

    def stop(self, handles: Sequence[str]) -> None:
        self.stopped += handles

    def close(self) -> None:
        self.n_closed += 1


SPECS = [WorkerSpec(index, "cpu", 1) for index in range(2)]


def test_a_worker_is_started_when_a_job_needs_it_and_used_again() -> None:
    puppets = Puppets()
    executor = Pool(puppets, SPECS)
    executor.start(A, "x")
    assert puppets.launched == SPECS[:1]
    assert puppets.sent == []
    puppets.says = [[("worker 1", Ready())], [("worker 1", Returned(7))]]
    assert executor.wait(None) == [Done(A, 7)]
    executor.start(B, "y")
    assert puppets.launched == SPECS[:1]
    assert puppets.sent == [("worker 1", "x"), ("worker 1", "y")]
    executor.start(A, "z")
    assert puppets.launched == SPECS
    executor.close()
    executor.close()
    assert puppets.stopped == ["worker 1", "worker 2"]
    assert puppets.n_closed == 1


def test_lost_worker_is_replaced_and_its_attempt_is_not() -> None:
    puppets = Puppets()
    executor = Pool(puppets, SPECS[:1])
    executor.start(A, "x")
    puppets.says = [[("worker 1", Ready())], [("worker 1", Died("it burns"))]]
    assert executor.wait(None) == [Lost(A, "it burns")]
    assert puppets.stopped == ["worker 1"]
    executor.start(B, "y")
    puppets.says = [[("worker 2", Ready())], [("worker 2", Raised(error := ValueError()))]]
    assert executor.wait(None) == [Failed(B, error)]
    assert puppets.sent == [("worker 1", "x"), ("worker 2", "y")]


def test_idle_worker_that_is_lost_costs_nothing() -> None:
    puppets = Puppets()
    executor = Pool(puppets, SPECS)
    executor.start(A, "x")
    puppets.says = [[("worker 1", Ready())], [("worker 1", Returned(1))]]
    assert executor.wait(None) == [Done(A, 1)]
    puppets.says = [[("worker 1", Died("it burns"))]]
    assert executor.wait(0) == []
    executor.start(B, "y")
    assert len(puppets.launched) == 2


def test_worker_that_does_not_start_is_no_loss_and_not_tried_for_ever() -> None:
    puppets = Puppets()
    executor = Pool(puppets, SPECS[:1])
    executor.start(A, "x")
    broken = DataError("the model folder is gone")
    puppets.says = [
        [("worker 1", NotReady(broken))],
        [("worker 2", Died("it burns"))],
        [("worker 2", Ready())],  # from the grave
        [("worker 3", Ready())],
        [("worker 3", Died("it burns"))],
    ]
    assert executor.wait(None) == [Lost(A, "it burns")]
    assert puppets.sent == [("worker 3", "x")]
    assert puppets.stopped == ["worker 1", "worker 2", "worker 3"]
    executor.start(A, "x")
    for number in (4, 5, 6):
        said: Message = NotReady(broken)
        puppets.says.append([(f"worker {number}", said)])
    with pytest.raises(DataError, match="the model folder is gone"):
        executor.wait(None)
    assert len(puppets.launched) == 6


def test_worker_that_is_never_ready_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    puppets, clock = Puppets(), iter(range(0, 1_000_000, 500))
    executor = Pool(puppets, SPECS[:1])
    monkeypatch.setattr(Pool, "now", lambda self: float(next(clock)))
    executor.start(A, "x")
    with pytest.raises(WorkerError, match=r"did not start 3 times: .* ready after 1800 s"):
        executor.wait(None)
    assert len(puppets.launched) == 3
    assert all(t is not None and 0 <= t < LONGEST_START for t in puppets.timeouts)


def test_words_of_a_worker_without_a_job_mean_nothing() -> None:
    puppets = Puppets()
    executor = Pool(puppets, SPECS)
    executor.start(A, "x")
    puppets.says = [[("worker 1", Ready())], [("worker 1", Returned(1))]]
    assert executor.wait(None) == [Done(A, 1)]
    puppets.says = [[("worker 1", Returned(2))], [("worker 1", Raised(ValueError()))]]
    assert executor.wait(0) == []
    assert executor.wait(0) == []


def test_no_workers_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one worker"):
        local_workers(worker_jobs.squares, 0)


def test_opening_that_cannot_be_sent_is_refused_at_once() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        local_workers(lambda spec: lambda payload: None, 1)


@pytest.mark.parametrize(
    ("gpus", "device", "expected"),
    [
        (0, "auto", ["cpu", "cpu", "cpu"]),
        (2, "auto", ["cuda:0", "cuda:1", "cuda:0"]),
        (2, "cpu", ["cpu", "cpu", "cpu"]),
    ],
)
def test_every_worker_has_a_device(
    gpus: int, device: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    executor = local_workers(worker_jobs.squares, 3, device=device)
    assert [slot.spec.device for slot in executor._slots] == expected

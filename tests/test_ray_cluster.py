"""Workers on Ray: the same as processes, and no cluster without a token."""

import importlib
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import services

from layerwise.errors import DataError, SolveError, UsageError, WorkerError
from layerwise.run.workers import pool as pool_module
from layerwise.run.workers import ray_cluster
from layerwise.run.workers.executor import Attempt, Done, Failed, Job
from layerwise.run.workers.messages import Opening
from layerwise.run.workers.pool import Pool
from layerwise.run.workers.ray_cluster import RayWorker, connect, ray_workers
from layerwise.run.workers.schedule import run_jobs
from tests.support import worker_jobs

AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.mark.slow
def test_workers_on_a_local_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One test, as Ray is slow to start, and parallel tests would start many."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # which must not count
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(private := tempfile.mkdtemp()))
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with connect("local", n_cpus=2):
        assert signal.getsignal(signal.SIGTERM) is on_sigterm
        _check_that_strangers_are_refused(Path(private))
        _check_results()
        _check_a_killed_worker(tmp_path)
        _check_errors()
        _check_an_opening_that_fails(monkeypatch)
        with pytest.raises(UsageError, match="Ray has 2 CPUs and 0 GPUs, too few for 3"):
            ray_workers(worker_jobs.squares, 3)
        connect("local", n_cpus=2).close()
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in os.environ
    Path(private).rmdir()  # nothing is left in it


ASK = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_get(b"key", b"space", timeout=5)
"""


def _check_that_strangers_are_refused(private: Path) -> None:
    """Only this program has the token; nothing listens to other machines."""
    address = ray.get_runtime_context().gcs_address
    token = os.environ["RAY_AUTH_TOKEN"]
    for mode, known in (("token", token), ("token", "0" * 64), ("disabled", "")):
        variables = os.environ | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": known}
        command = [sys.executable, "-c", ASK, address]
        ends = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert (ends.returncode == 0) == (known == token), ends.stderr
        assert known == token or "ray-security" in ends.stderr
    (node,) = ray.nodes()
    ports = [node["NodeManagerPort"], node["ObjectManagerPort"], address.rpartition(":")[2]]
    for port in ports:  # whoever listens everywhere answers here too
        with pytest.raises(OSError, match=r"refused|unreachable|assign"):
            socket.create_connection(("127.0.0.2", int(port)), timeout=5)
    (folder,) = private.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def _run_all(opening: Opening, count: int, payloads: Sequence[Any], **options: Any) -> Any:
    values: dict[int | str, Any] = {}
    jobs = (Job(key, payload) for key, payload in enumerate(payloads))
    run_jobs(
        jobs,
        ray_workers(opening, count),
        on_done=lambda job, value: values.update({job.key: value}),
        **options,
    )
    return [values[key] for key in range(len(payloads))]


def _check_results() -> None:
    results = _run_all(worker_jobs.squares, 2, range(12))
    assert [result["value"] for result in results] == [number**2 for number in range(12)]
    assert all(result["same"] and result["spec"].device == "cpu" for result in results)
    assert os.getpid() not in {result["pid"] for result in results}


def _check_a_killed_worker(folder: Path) -> None:
    notes: list[str] = []
    flag = str(folder / "flag")
    _run_all(worker_jobs.suicides, 1, [flag], on_note=notes.append)
    (note,) = notes
    assert note.startswith("job 0 lost its worker (Ray says: The actor died")


def _check_errors() -> None:
    executor = ray_workers(worker_jobs.troubles, 1)
    try:
        error = _error(executor, "solve error")
        assert type(error) is SolveError
        assert str(error) == "layer 3 has no answer"
        assert "in work" in error.__notes__[0]
        assert "Fickle: layer 3 is moody" in str(_error(executor, "fickle"))
        assert "cannot be read" in str(_error(executor, "unreadable"))
        executor.start(Attempt("a", 0), 5)
        assert executor.wait(60) == [Done(Attempt("a", 0), 5)]
    finally:
        executor.close()


def _error(executor: Pool[RayWorker], payload: Any) -> BaseException:
    executor.start(Attempt("a", 0), payload)
    (event,) = executor.wait(60)
    assert isinstance(event, Failed)
    return event.error


def _check_an_opening_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "STARTS", 1)
    with pytest.raises(DataError, match="the model folder is gone"):
        _run_all(worker_jobs.closed_shop, 1, [1])


def test_a_ray_that_cannot_be_kept_private_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delattr("ray._raylet.AuthenticationTokenLoader")
    with pytest.raises(WorkerError, match=r"cannot be kept private .*: install another"):
        connect("local", n_cpus=1)
    assert not ray.is_initialized()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"


# --- without a Ray that runs -------------------------------------------------------------


@pytest.fixture
def init_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> list[tuple[str, dict[str, Any]]]:
    """Nothing that authenticates, and how Ray would have been started: it refuses."""
    for name in AUTHENTICATION:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    calls: list[tuple[str, dict[str, Any]]] = []

    def init(address: str, **options: Any) -> None:
        calls.append((address, options))
        refused = ConnectionError("nobody listens\nthere")
        raise refused

    monkeypatch.setattr(ray, "init", init)
    return calls


Calls = list[tuple[str, dict[str, Any]]]


@pytest.mark.parametrize("address", ["auto", "10.0.0.1:6379", "ray://10.0.0.1:10001", ""])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"RAY_AUTH_TOKEN": "secret"},
        {"RAY_AUTH_MODE": "token"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/does/not/exist"},
        {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "secret"},
    ],
)
def test_cluster_without_a_token_is_refused(
    address: str,
    settings: dict[str, str],
    init_calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"):
        ray_workers(worker_jobs.squares, 2, address=address)
    assert init_calls == []


@pytest.mark.parametrize("where", ["variable", "file", "home"])
def test_cluster_with_a_token_is_tried(
    where: str, init_calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    if where == "variable":
        monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    else:
        token = tmp_path / ".ray" / "auth_token"
        token.parent.mkdir()
        if where == "file":
            token = tmp_path / "token"
            monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        token.write_text("secret")
    with pytest.raises(WorkerError, match=r"^cannot use Ray at auto: nobody listens$"):
        ray_workers(worker_jobs.squares, 2, address="auto")
    ((address, options),) = init_calls
    assert address == "auto"
    assert not set(options) & {"num_cpus", "object_store_memory"}


def test_local_ray_is_small_and_sends_nothing_home(
    init_calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    with pytest.raises(WorkerError, match="cannot use Ray at local"):
        ray_workers(worker_jobs.squares, 2, threads=3)
    ((address, options),) = init_calls
    assert address == "local"
    assert options["num_cpus"] == 6
    assert options["include_dashboard"] is False
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("mode", [None, "disabled", "token"])
def test_local_ray_asks_for_a_token_of_its_own(
    mode: str | None,
    init_calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    address = services.get_node_ip_address()
    theirs = {"RAY_AUTH_TOKEN": "theirs"} | (
        {} if mode is None else {"RAY_AUTH_MODE": mode}
    )
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    seen: list[tuple[str, str]] = []
    refuse = ray.init

    def init(address: str, **options: Any) -> None:
        seen.append((os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"]))
        raylet: Any = importlib.import_module("ray._raylet")
        assert raylet.get_authentication_mode() == raylet.AuthenticationMode.TOKEN
        assert services.get_node_ip_address() == "127.0.0.1"
        refuse(address, **options)

    monkeypatch.setattr(ray, "init", init)
    for _ in range(2):
        with pytest.raises(WorkerError, match="cannot use Ray at local"):
            ray_workers(worker_jobs.squares, 2)
    (first, token), (_, other) = seen
    assert len({token, other, "theirs"}) == 3
    assert (first, len(token)) == ("token", 64)
    assert {n: os.environ[n] for n in AUTHENTICATION if n in os.environ} == theirs
    assert services.get_node_ip_address() == address
    assert list(tmp_path.iterdir()) == []  # no file in the home folder


def test_local_ray_needs_a_folder_for_its_files(
    init_calls: Calls, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(WorkerError, match=r"No such file.*change RAY_TMPDIR"):
        ray_workers(worker_jobs.squares, 2)
    assert init_calls == []


@pytest.mark.parametrize(
    ("there", "count", "has_gpus"),
    [({"CPU": 4.0}, 2, False), ({"CPU": 8.0, "GPU": 2.0}, 2, True)],
)
def test_workers_get_a_gpu_where_there_are_some(
    there: dict[str, float], count: int, has_gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    assert ray_cluster._check_resources(count, 2) == has_gpus
    with pytest.raises(UsageError, match="too few for 3 workers of 2 threads"):
        ray_cluster._check_resources(3, 2)


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'pip install "layerwise\[ray\]"'):
        ray_workers(worker_jobs.squares, 2)


def test_no_workers_are_refused() -> None:
    with pytest.raises(UsageError, match="at least one worker"):
        ray_workers(worker_jobs.squares, 0)

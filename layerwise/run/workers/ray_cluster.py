"""Workers that are Ray actors, on this machine or on a cluster.

Ray places every worker and reports when one dies. Retries are left to the scheduler, by
the same rules as for processes. Only file names and small values go through Ray, so the
machines must share the file system of the run.
"""

import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError, WorkerError
from layerwise.run.workers.messages import (
    Died,
    Message,
    Opening,
    Work,
    WorkerSpec,
    do_work,
    open_work,
    read_message,
)
from layerwise.run.workers.pool import Pool
from layerwise.run.workers.private_ray import private_ray

LOCAL = "local"

# Bytes of the object store of a local Ray, which holds hardly anything.
OBJECT_STORE = 80_000_000

# Ray reads its token from this file of the home folder if no variable is set.
TOKEN_FILE = Path(".ray") / "auth_token"


def ray_workers(
    opening: Opening, count: int, *, address: str = LOCAL, threads: int = 1
) -> Pool["RayWorker"]:
    """Executor on actors of Ray.

    Parameters
    ----------
    opening
        Called once in every worker, with its `WorkerSpec`; returns the function that does a
        job, given the payload of the job. Its module must be installed on every machine.
    count
        Number of workers. Each is started when there is a job for it.
    address
        "local" starts Ray on this machine; "auto", "host:port" and "ray://host:port" name
        a running cluster. A process that is already connected to Ray keeps its connection.
    threads
        PyTorch threads in each worker, and CPUs that Ray reserves for it. If Ray has GPUs,
        each worker also gets one for itself.

    Returns
    -------
    Pool
        Executor for `run_jobs`, which closes it. This ends a Ray or a connection that was
        started here, and keeps an earlier one.

    Raises
    ------
    UsageError
        Ray is not installed; the cluster is used without a token, so that anyone who
        reaches its port could run code on it; it has fewer CPUs or GPUs than needed.
    WorkerError
        The cluster cannot be reached.
    """
    if count < 1:
        message = f"there must be at least one worker, not {count}"
        raise UsageError(message)
    connection = connect(address, n_cpus=count * threads)
    try:
        has_gpus = _check_resources(count, threads)
        specs = [
            WorkerSpec(i, "cuda" if has_gpus else "cpu", threads) for i in range(count)
        ]
        return Pool(RayBackend(opening, has_gpus, connection), specs)
    except BaseException:
        connection.close()
        raise


def connect(address: str, *, n_cpus: int) -> ExitStack:
    """Connect to Ray, and start it if it is local.

    Returns
    -------
    ExitStack
        Closing it undoes this; it is empty if the process was already connected.
    """
    if address != LOCAL:
        _check_token(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = _import_ray()
    with ExitStack() as connection:
        if not ray.is_initialized():
            options: dict[str, Any] = {}
            if address == LOCAL:
                options = connection.enter_context(private_ray())
                options |= {"num_cpus": n_cpus, "object_store_memory": OBJECT_STORE}
            connection.callback(ray.shutdown)
            _initialize(ray, address, options)
        return connection.pop_all()


def _initialize(ray: Any, address: str, options: dict[str, Any]) -> None:
    try:
        with _signals_kept():
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
            )
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        message = f"cannot use Ray at {address}: {_first_line(error)}"
        raise WorkerError(message) from error


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        message = 'workers on Ray need Ray: pip install "layerwise[ray]"'
        raise UsageError(message) from error
    return ray


def _check_token(address: str) -> None:
    """Refuse a cluster on which anyone who reaches its port could run code."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / TOKEN_FILE
    token = bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).is_file()
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or not token:
        message = (
            f"Ray at {address} must require a token, or anyone who reaches its port can "
            f"run code: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            f"RAY_AUTH_TOKEN_PATH, here and on the cluster"
        )
        raise UsageError(message)


def _check_resources(count: int, threads: int) -> bool:
    """Return whether there are GPUs; refuse workers that would wait forever."""
    resources = _import_ray().cluster_resources()
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 0)
    if cpus < count * threads or (gpus and gpus < count):
        message = (
            f"Ray has {cpus:g} CPUs and {gpus:g} GPUs, too few for {count} workers of "
            f"{threads} threads{' and one GPU' if gpus else ''} each; use fewer workers"
        )
        raise UsageError(message)
    return bool(gpus)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Restore the program's handler of SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@dataclass(eq=False)
class RayWorker:
    """An actor and its pending call, None when it is idle."""

    actor: Any
    pending: Any


class RayBackend:
    """Starts actors and listens to them."""

    def __init__(self, opening: Opening, has_gpus: bool, connection: ExitStack) -> None:
        self._opening = pickle.dumps(opening)
        self._connection = connection
        self._ray = _import_ray()
        self._actor_class = self._ray.remote(_Actor)
        self._n_gpus = 1 if has_gpus else 0

    def launch(self, spec: WorkerSpec) -> RayWorker:
        """Begin to start an actor."""
        actor = self._actor_class.options(
            num_cpus=spec.threads,
            num_gpus=self._n_gpus,
            max_restarts=0,
            max_task_retries=0,
        ).remote()
        return RayWorker(actor, actor.open.remote(self._opening, spec))

    def send(self, handle: RayWorker, payload: Any) -> None:
        """Send a payload to a ready worker; if it has died, `poll` will report that."""
        handle.pending = handle.actor.work.remote(pickle.dumps(payload))

    def poll(
        self, handles: Sequence[RayWorker], timeout: float | None
    ) -> list[tuple[RayWorker, Message]]:
        """Block until a worker sends a message or dies, or the timeout passes."""
        pending = {h.pending: h for h in handles if h.pending is not None}
        if not pending:
            time.sleep(timeout or 0.0)
            return []
        self._ray.wait(list(pending), num_returns=1, timeout=timeout)
        ready, _ = self._ray.wait(list(pending), num_returns=len(pending), timeout=0)
        return [(pending[call], self._answer(pending[call])) for call in ready]

    def _answer(self, handle: RayWorker) -> Message:
        call, handle.pending = handle.pending, None
        try:
            return read_message(self._ray.get(call))
        except self._ray.exceptions.RayError as error:  # errors of a job come as messages
            return Died(f"Ray says: {_first_line(error)}")

    def stop(self, handles: Sequence[RayWorker]) -> None:
        """Kill actors; they write files atomically, so no partial file appears."""
        for handle in handles:
            self._ray.kill(handle.actor)

    def close(self) -> None:
        """End the connection to Ray, or the Ray, that was started for these workers."""
        self._connection.close()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))


# -- in the worker ------------------------------------------------------------------------


class _Actor:
    """A worker."""

    def __init__(self) -> None:
        self._work: Work | None = None

    def open(self, opening: bytes, spec: WorkerSpec) -> bytes:
        """Build the context."""
        self._work, message = open_work(opening, spec)
        return message

    def work(self, payload: bytes) -> bytes:
        """Do a job."""
        assert self._work is not None
        return do_work(self._work, payload)

"""Workers that are actors of Ray: of a local one, or of a cluster of machines.

Ray finds a place for every worker and tells when one is gone. It tries nothing again: the
scheduler does, by the same rules as for processes. Nothing but names of files and small
values goes through Ray, so the machines must share the file system of the run.
"""

import contextlib
import logging
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import UsageError, WorkerError
from layerwise.run.workers.messages import (
    Gone,
    Message,
    Opening,
    Place,
    Work,
    do_work,
    open_work,
    read_message,
)
from layerwise.run.workers.pool import Pool

LOCAL = "local"

# Bytes of the object store of a local Ray: hardly anything is put into it.
OBJECT_STORE = 80_000_000

# Where Ray looks for a token that no variable names.
TOKEN_FILE = Path(".ray") / "auth_token"


def ray_workers(
    opening: Opening, count: int, *, address: str = LOCAL, threads: int = 1
) -> Pool["RayWorker"]:
    """Executor on actors of Ray.

    Parameters
    ----------
    opening
        Called once in every worker, with its `Place`; returns the function that does a
        job, given the payload of the job. Its module must be installed on every machine.
    count
        Number of workers. They are started when there are jobs for them.
    address
        "local" starts Ray on this machine; "auto", "host:port" and "ray://host:port" name
        a cluster that runs. A process that is connected to Ray stays connected to that.
    threads
        Threads of PyTorch in each, and CPUs that Ray sets aside for it. A worker also gets
        a GPU for itself where Ray knows of any.

    Returns
    -------
    Pool
        Executor for `run_jobs`, which closes it: what was started here ends, and what was
        there before goes on.

    Raises
    ------
    UsageError
        Ray is not installed; the cluster is used without a token, so that whoever reaches
        its port could run code on it; it has fewer CPUs or GPUs than the workers need.
    WorkerError
        The cluster cannot be reached.
    """
    if count < 1:
        message = f"there must be at least one worker, not {count}"
        raise UsageError(message)
    connected = connect(address, n_cpus=count * threads)
    try:
        has_gpus = _check_resources(count, threads)
        places = [Place(i, "cuda" if has_gpus else "cpu", threads) for i in range(count)]
        return Pool(RayBackend(opening, has_gpus, connected), places)
    except BaseException:
        disconnect(connected)
        raise


def connect(address: str, *, n_cpus: int) -> bool:
    """Connect to Ray, and start it if it is local; False if that was done before."""
    if address != LOCAL:
        _check_token(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL and "ray" not in sys.modules:  # which reads it once, and later
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # versions set it by themselves
    ray = _import_ray()
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"num_cpus": n_cpus, "include_dashboard": False}
        options["object_store_memory"] = OBJECT_STORE
    try:
        with _signals_kept():
            ray.init(address=address, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        message = f"cannot use Ray at {address}: {_first_line(error)}"
        raise WorkerError(message) from error
    return True


def disconnect(connected: bool) -> None:
    """Undo `connect`, given what it returned."""
    if connected:
        _import_ray().shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        message = 'workers on Ray need Ray: pip install "layerwise[ray]"'
        raise UsageError(message) from error
    return ray


def _check_token(address: str) -> None:
    """Refuse a cluster that anybody who reaches its port could run code on."""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / TOKEN_FILE
    token = bool(os.environ.get("RAY_AUTH_TOKEN")) or Path(path).is_file()
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or not token:
        message = (
            f"Ray at {address} must ask for a token, or whoever reaches its port runs code"
            f": set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, here "
            f"and on the cluster"
        )
        raise UsageError(message)


def _check_resources(count: int, threads: int) -> bool:
    """Return whether there are GPUs; refuse workers that would wait for ever."""
    there = _import_ray().cluster_resources()
    gpus, cpus = there.get("GPU", 0), there.get("CPU", 0)
    if cpus < count * threads or (gpus and gpus < count):
        message = (
            f"Ray has {cpus:g} CPUs and {gpus:g} GPUs, too few for {count} workers of "
            f"{threads} threads{' and one GPU' if gpus else ''} each; use fewer workers"
        )
        raise UsageError(message)
    return bool(gpus)


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep what the program does on SIGTERM, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@dataclass(eq=False)
class RayWorker:
    """An actor, and what it was asked last, until it has answered."""

    actor: Any
    asked: Any


class RayBackend:
    """Starts actors and listens to them."""

    def __init__(self, opening: Opening, has_gpus: bool, connected: bool) -> None:
        self._opening = pickle.dumps(opening)
        self._connected = connected
        self._ray = _import_ray()
        self._actor_class = self._ray.remote(_Actor)
        self._n_gpus = 1 if has_gpus else 0

    def launch(self, place: Place) -> RayWorker:
        """Begin to start an actor."""
        actor = self._actor_class.options(
            num_cpus=place.threads,
            num_gpus=self._n_gpus,
            max_restarts=0,
            max_task_retries=0,
        ).remote()
        return RayWorker(actor, actor.open.remote(self._opening, place))

    def send(self, handle: RayWorker, payload: Any) -> None:
        """Give a payload to a worker that is ready; if it is gone, `poll` will say so."""
        handle.asked = handle.actor.work.remote(pickle.dumps(payload))

    def poll(
        self, handles: Sequence[RayWorker], timeout: float | None
    ) -> list[tuple[RayWorker, Message]]:
        """Block until a worker says something or is gone, or the time is over."""
        asked = {handle.asked: handle for handle in handles if handle.asked is not None}
        if not asked:
            time.sleep(timeout or 0.0)
            return []
        self._ray.wait(list(asked), num_returns=1, timeout=timeout)
        ready, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=0)
        return [(asked[reference], self._answer(asked[reference])) for reference in ready]

    def _answer(self, handle: RayWorker) -> Message:
        asked, handle.asked = handle.asked, None
        try:
            return read_message(self._ray.get(asked))
        except self._ray.exceptions.RayError as error:  # a job's own comes as a message
            return Gone(f"Ray says: {_first_line(error)}")

    def stop(self, handles: Sequence[RayWorker]) -> None:
        """Kill actors; what they were writing was not to be seen before it is whole."""
        for handle in handles:
            self._ray.kill(handle.actor)

    def close(self) -> None:
        """End the connection, and the Ray, that was made for these workers."""
        disconnect(self._connected)


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), repr(error))


# -- in the worker ------------------------------------------------------------------------


class _Actor:
    """A worker."""

    def __init__(self) -> None:
        self._work: Work | None = None

    def open(self, opening: bytes, place: Place) -> bytes:
        """Build the context."""
        self._work, message = open_work(opening, place)
        return message

    def work(self, payload: bytes) -> bytes:
        """Do a job."""
        assert self._work is not None
        return do_work(self._work, payload)

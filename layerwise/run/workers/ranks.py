"""Ranks: the processes that share one run, as torchrun starts them.

Short texts go through the key-value store by which the ranks found each other. Tensors go
through a process group: NCCL where every rank has a GPU of its own, else Gloo. Before every
collective, all ranks wait for each other at the store. So a rank may solve for hours while
the others wait, a failure of one rank ends all of them, and no collective starts without
every rank.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import UsageError, WorkerError

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START_TIMEOUT = timedelta(minutes=10)  # until all ranks have joined
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # for one tensor, after the barrier
FIRST_POLL, LONGEST_POLL = 0.001, 0.05  # seconds between two polls of the store
FAILURE_GRACE = 5.0  # seconds for which a failed rank keeps the store alive for the others


class Ranks:
    """The only process of a run, rank 0 of 1; its collectives return at once."""

    rank = 0
    size = 1

    @property
    def are_several(self) -> bool:
        """Whether the run is shared."""
        return self.size > 1

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes the files and reports the progress."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks have called this.

        Raises
        ------
        WorkerError
            Another rank failed or died.
        """

    def broadcast_text(self, key: str, text: str | None) -> str:
        """Give the text of one rank to all ranks; every key is used once."""
        assert text is not None
        return text

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors over the ranks, in place; all ranks have the same shapes."""

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Give the tensors of one rank to all others, in place."""


ALONE = Ranks()


class SharingRanks(Ranks):
    """One of several ranks.

    Parameters
    ----------
    store
        Key-value store of this run, shared by all ranks.
    rank, size
        Rank of this process, and number of ranks.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._barriers = 0
        self._collective_device: torch.device | None = None  # None: any device

    def start(self, own_gpu: bool) -> None:
        """Make the process group, after every rank has reported whether it has a GPU."""
        import torch.distributed as dist

        self._store.add("own GPU", int(own_gpu))
        self.barrier()
        nccl = self._store.add("own GPU", 0) == self.size and dist.is_nccl_available()
        self._collective_device = None if nccl else torch.device("cpu")
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        try:
            dist.init_process_group(
                "nccl" if nccl else "gloo",
                store=dist.PrefixStore("group", self._store),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=device,
            )
        except RuntimeError as error:
            message = f"the {self.size} ranks cannot form a group: {_line(error)}"
            raise WorkerError(message) from error

    def barrier(self) -> None:
        """Wait at the store until all ranks have called this."""
        self._barriers += 1
        pause = FIRST_POLL
        arrived = self._count("arrived", 1)
        while arrived < self._barriers * self.size:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL)
            arrived = self._count("arrived", 0)

    def _count(self, key: str, amount: int) -> int:
        """Add to a counter of the store and return it; raise if a rank has failed."""
        try:
            failed = self._store.check(["failed"])
            reason = self._store.get("failed").decode() if failed else ""
            count = int(self._store.add(key, amount))
        except RuntimeError as error:
            message = (
                "the store of the ranks cannot be reached: the rank that hosts it has "
                "ended; see its output"
            )
            raise WorkerError(message) from error
        if failed:
            raise WorkerError(reason)
        return count

    def broadcast_text(self, key: str, text: str | None) -> str:
        """Write the text to the store, wait for all ranks, and read it."""
        if text is not None:
            self._store.set(f"text {key}", text)
        self.barrier()
        return text or str(self._store.get(f"text {key}").decode())

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Add in the type of the tensors; the library chooses the order of the ranks."""
        import torch.distributed as dist

        self.barrier()
        for tensor in tensors:
            moved = self._movable(tensor)
            dist.all_reduce(moved)
            _copy_back(moved, tensor)

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Broadcast contiguous tensors."""
        import torch.distributed as dist

        self.barrier()
        for tensor in tensors:
            moved = self._movable(tensor)
            dist.broadcast(moved, owner)
            _copy_back(moved, tensor)

    def _movable(self, tensor: Tensor) -> Tensor:
        device = self._collective_device
        return tensor if device is None else tensor.to(device)

    def fail(self, error: BaseException) -> None:
        """Report a failure to the other ranks; they all raise the first one."""
        reason = f"rank {self.rank} failed: {error or type(error).__name__}"
        try:
            self._store.compare_set("failed", "", reason)
            self._leave(FAILURE_GRACE)
        except RuntimeError:
            return  # the store, and so the rank that hosts it, has ended

    def close(self) -> None:
        """End the process group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def finish(self) -> None:
        """Leave when the run is done; rank 0, which may host the store, leaves last."""
        self._leave(START_TIMEOUT.total_seconds())

    def _leave(self, patience: float) -> None:
        left = self._store.add("left", 1)
        until = time.monotonic() + patience
        while self.first and left < self.size and time.monotonic() < until:
            time.sleep(LONGEST_POLL)
            left = self._store.add("left", 0)


def _copy_back(moved: Tensor, tensor: Tensor) -> None:
    if moved is not tensor:
        tensor.copy_(moved)


@dataclass(frozen=True)
class RankEnvironment:
    """Environment variables that torchrun sets for this process.

    Parameters
    ----------
    rank, size
        Rank among all processes, and their number.
    local_rank, local_size
        Rank among the processes on this machine, and their number.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def read(cls) -> "RankEnvironment":
        """Read the variables; without ``WORLD_SIZE``, or if it is 1, there is one rank.

        Raises
        ------
        UsageError
            A variable is missing or is not a number.
        """
        size = _number("WORLD_SIZE", 1)
        if size == 1:
            return cls()
        missing = [name for name in VARIABLES if not os.environ.get(name)]
        if missing:
            message = (
                f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start the "
                f"ranks with torchrun, or unset WORLD_SIZE"
            )
            raise UsageError(message)
        rank = _number("RANK", 0)
        return cls(
            rank, size, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", size)
        )

    def own_gpu(self, device: str | torch.device) -> int | None:
        """Index of the GPU of this rank alone, unless the device names another."""
        if str(device) not in ("auto", "cuda") or not torch.cuda.is_available():
            return None
        return self.local_rank if torch.cuda.device_count() >= self.local_size else None


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        message = f"the environment variable {name} is {text!r}: it must be a number"
        raise UsageError(message)
    return int(text)


@contextmanager
def ranks_of_environment(device: str | torch.device = "auto") -> Iterator[Ranks]:
    """Ranks that share the run inside the ``with`` block, from torchrun's variables.

    Parameters
    ----------
    device
        The requested device. With ``"auto"`` or ``"cuda"`` every rank takes the GPU with
        its local rank, if the machine has a GPU for each of its ranks.

    Raises
    ------
    UsageError
        The variables contradict each other, or a process group already exists.
    WorkerError
        The other ranks did not join, or one of them failed.
    """
    environment = RankEnvironment.read()
    if environment.size == 1:
        yield ALONE
        return
    with _own_gpu(environment.own_gpu(device)) as own_gpu:
        ranks = _join(environment)
        try:
            ranks.start(own_gpu)
            yield ranks
        except BaseException as error:
            ranks.fail(error)
            raise
        finally:
            ranks.close()
        ranks.finish()


@contextmanager
def _own_gpu(index: int | None) -> Iterator[bool]:
    """Make a GPU the current one, and yield whether there is one."""
    if index is None:
        yield False
        return
    with torch.cuda.device(index):
        yield True


def _join(environment: RankEnvironment) -> SharingRanks:
    """Find the other ranks; every run of these processes gets its part of the store."""
    import torch.distributed as dist

    if dist.is_initialized():
        message = (
            "torch.distributed is already initialized, and a shared run makes its own "
            "process group: destroy the existing group first, or unset WORLD_SIZE"
        )
        raise UsageError(message)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=START_TIMEOUT))  # type: ignore[attr-defined]
        run = store.add(f"runs of {environment.rank}", 1)
    except (RuntimeError, ValueError) as error:
        message = f"the {environment.size} ranks did not find each other: {_line(error)}"
        raise WorkerError(message) from error
    own = dist.PrefixStore(f"run {run}", store)  # type: ignore[attr-defined]
    return SharingRanks(own, environment.rank, environment.size)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Rank for every piece of work: the most expensive first, each to the least busy rank.

    All ranks compute the same owners; ties go to the lower rank.
    """
    busy = [0.0] * size
    owner_of = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = busy.index(min(busy))
        owner_of[index] = owner
        busy[owner] += costs[index]
    return owner_of

"""Ranks: the processes that share one run, as torchrun starts them.

Two things pass between them. Small words go through the key-value store by which they
found each other; tensors go through a process group, NCCL where every rank has a GPU of
its own, else Gloo. Before tensors move, all ranks meet at the store, so a rank may solve
for hours while the others wait, a failure of one ends all of them, and no collective
starts that somebody does not join.
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
START = timedelta(minutes=10)  # for all ranks to be there
MOVE = timedelta(minutes=30)  # for one tensor, once all ranks are there
FIRST_NAP, LONGEST_NAP = 0.001, 0.05  # seconds between two looks at who has come
FAREWELL = 5.0  # seconds for which a failed rank keeps the store for the others


class Ranks:
    """The only process of a run, rank 0 of 1: what ranks do together is done at once."""

    rank = 0
    size = 1

    @property
    def are_several(self) -> bool:
        """Whether the run is shared."""
        return self.size > 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and tells."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until all ranks are here.

        Raises
        ------
        WorkerError
            Another rank failed or is gone.
        """

    def broadcast_text(self, key: str, text: str | None) -> str:
        """One rank has a text, and all of them get it; every key is used once."""
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
        Key-value store of this run, seen by all ranks.
    rank, size
        Which one this is, of how many.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._meetings = 0
        self._home: torch.device | None = None  # where tensors can move; None: anywhere

    def start(self, own_gpu: bool) -> None:
        """Make the process group, once all ranks have said whether they have a GPU."""
        import torch.distributed as dist

        self._store.add("own GPU", int(own_gpu))
        self.barrier()
        nccl = self._store.add("own GPU", 0) == self.size and dist.is_nccl_available()
        self._home = None if nccl else torch.device("cpu")
        device = torch.device("cuda", torch.cuda.current_device()) if nccl else None
        try:
            dist.init_process_group(
                "nccl" if nccl else "gloo",
                store=dist.PrefixStore("group", self._store),  # type: ignore[attr-defined]
                rank=self.rank,
                world_size=self.size,
                timeout=MOVE,
                device_id=device,
            )
        except RuntimeError as error:
            message = f"the {self.size} ranks cannot form a group: {_line(error)}"
            raise WorkerError(message) from error

    def barrier(self) -> None:
        """Wait at the store until all ranks are here."""
        self._meetings += 1
        nap = FIRST_NAP
        arrived = self._look("arrived", 1)
        while arrived < self._meetings * self.size:
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP)
            arrived = self._look("arrived", 0)

    def _look(self, key: str, amount: int) -> int:
        """Count, unless a rank has failed."""
        try:
            failed = self._store.check(["failed"])
            reason = self._store.get("failed").decode() if failed else ""
            count = int(self._store.add(key, amount))
        except RuntimeError as error:
            message = "the store of the ranks is gone, and with it the rank that kept it"
            raise WorkerError(message) from error
        if failed:
            raise WorkerError(reason)
        return count

    def broadcast_text(self, key: str, text: str | None) -> str:
        """Lay the text down in the store, meet, and take it."""
        if text is not None:
            self._store.set(f"told {key}", text)
        self.barrier()
        return text or str(self._store.get(f"told {key}").decode())

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Add in the type of the tensors; the order of the ranks is the library's."""
        import torch.distributed as dist

        self.barrier()
        for tensor in tensors:
            moved = self._movable(tensor)
            dist.all_reduce(moved)
            _back(moved, tensor)

    def broadcast(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Broadcast tensors, which are contiguous."""
        import torch.distributed as dist

        self.barrier()
        for tensor in tensors:
            moved = self._movable(tensor)
            dist.broadcast(moved, owner)
            _back(moved, tensor)

    def _movable(self, tensor: Tensor) -> Tensor:
        return tensor if self._home is None else tensor.to(self._home)

    def fail(self, error: BaseException) -> None:
        """Let the others know; the first reason is what they tell."""
        reason = f"rank {self.rank} failed: {error or type(error).__name__}"
        try:
            self._store.compare_set("failed", "", reason)
            self._leave(FAREWELL)
        except RuntimeError:
            return  # nobody is left who could be told

    def close(self) -> None:
        """End the process group."""
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()

    def finish(self) -> None:
        """Leave when the run is done; rank 0, which may keep the store, leaves last."""
        self._leave(START.total_seconds())

    def _leave(self, patience: float) -> None:
        left = self._store.add("left", 1)
        until = time.monotonic() + patience
        while self.first and left < self.size and time.monotonic() < until:
            time.sleep(LONGEST_NAP)
            left = self._store.add("left", 0)


def _back(moved: Tensor, tensor: Tensor) -> None:
    if moved is not tensor:
        tensor.copy_(moved)


@dataclass(frozen=True)
class Place:
    """Where torchrun has put this process: the variables that it sets.

    Parameters
    ----------
    rank, size
        Of all processes.
    local_rank, local_size
        Of those on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def of_environment(cls) -> "Place":
        """Read the variables; without ``WORLD_SIZE``, or if it is 1, there is one rank.

        Raises
        ------
        UsageError
            A variable is missing or is no number.
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
        """Index of the GPU that is for this rank alone, if the device leaves it open."""
        if str(device) not in ("auto", "cuda") or not torch.cuda.is_available():
            return None
        return self.local_rank if torch.cuda.device_count() >= self.local_size else None


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        message = f"the environment variable {name} is {text!r}, which is no number"
        raise UsageError(message)
    return int(text)


@contextmanager
def ranks_of_environment(device: str | torch.device = "auto") -> Iterator[Ranks]:
    """Ranks that share the run inside, by the variables that torchrun sets.

    Parameters
    ----------
    device
        As it was asked for. With ``"auto"`` or ``"cuda"`` every rank takes the GPU of its
        number on its machine, if there are as many as ranks.

    Raises
    ------
    UsageError
        The variables contradict each other, or a process group is there already.
    WorkerError
        The other ranks did not come, or one of them failed.
    """
    place = Place.of_environment()
    if place.size == 1:
        yield ALONE
        return
    with _own_gpu(place.own_gpu(device)) as own_gpu:
        ranks = _join(place)
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
    """Make a GPU the one that ``"cuda"`` means; whether there is one."""
    if index is None:
        yield False
        return
    with torch.cuda.device(index):
        yield True


def _join(place: Place) -> SharingRanks:
    """Find the other ranks; every run of these processes gets a part of the store."""
    import torch.distributed as dist

    if dist.is_initialized():
        message = (
            "torch.distributed is in use by the caller: a run that is shared makes its own "
            "process group; destroy the other one first, or unset WORLD_SIZE"
        )
        raise UsageError(message)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=START))  # type: ignore[attr-defined]
        run = store.add(f"runs of {place.rank}", 1)
    except (RuntimeError, ValueError) as error:
        message = f"the {place.size} ranks did not find each other: {_line(error)}"
        raise WorkerError(message) from error
    own = dist.PrefixStore(f"run {run}", store)  # type: ignore[attr-defined]
    return SharingRanks(own, place.rank, place.size)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def owners(costs: Sequence[float], size: int) -> list[int]:
    """Rank of every piece of work: the most expensive first, each to the least busy rank.

    The same on every rank; ties go to the lower one.
    """
    busy = [0.0] * size
    found = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = busy.index(min(busy))
        found[index] = owner
        busy[owner] += costs[index]
    return found

"""Memory and disk space of this machine: how much is free, how much a run may use."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.errors import DataError

STORE = 1 << 30  # bytes that the kept inputs of a block may take on any device
DEVICE_SHARE = 8  # on an accelerator they may take the free memory divided by this
HIDDEN_SHARE = 4  # hidden states go to the disk above the free memory divided by this


@dataclass(frozen=True)
class Capacity:
    """Bytes available to a new process; None where unknown.

    Parameters
    ----------
    host
        Memory without swapping.
    device
        Memory of the accelerator; None on a CPU.
    disk
        Space on the disk of the output; None without an output.
    """

    host: int | None
    device: int | None
    disk: int | None


def capacity_of(device: torch.device, output: Path | None) -> Capacity:
    """Return the free resources; host memory of this process counts as free."""
    return Capacity(
        free_host(),
        None if device.type == "cpu" else free_device(device),
        None if output is None else free_disk(output),
    )


def free_host() -> int | None:
    """Bytes of host memory that would be free if this process had ended."""
    available = free_memory()
    return None if available is None else available + own_memory()


def own_memory() -> int:
    """Bytes of memory that only this process uses; 0 if the system does not report it."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as lines:
            line = next(line for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return 0
    return int(line.split()[1]) * 1024


def free_device(device: torch.device) -> int | None:
    """Bytes of free memory on an accelerator."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def room(device: torch.device) -> int:
    """Bytes that the kept inputs of a block may take on a device.

    The result of a run does not depend on it, only the number of passes through a block.
    """
    if device.type != "cuda":
        return STORE
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    return max(STORE, int(free) // DEVICE_SHARE)


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raise if a run will write more into a folder than its disk has free.

    Parameters
    ----------
    folder
        The partial folder; files that an interrupted run has already written count.
    needed
        Bytes of the finished folder.
    """
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = free_disk(folder)
    if free is not None and needed - present > free:
        message = (
            f"{folder} needs {needed - present} bytes but its disk has {free}: free space "
            f"there or choose another output"
        )
        raise DataError(message)


def free_disk(path: Path) -> int | None:
    """Bytes on the disk that will hold a path, which need not exist."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def free_memory() -> int | None:
    """Bytes of memory that a new allocation can get without swapping, if known."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None

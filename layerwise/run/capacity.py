"""What this machine has left: memory of the host and of a device, space on a disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from layerwise.errors import DataError
from layerwise.run.activations.hidden_store import free_memory


@dataclass(frozen=True)
class Capacity:
    """Bytes that a new process can have; None where nobody knows.

    Parameters
    ----------
    host
        Memory without swapping.
    device
        Memory of the accelerator; None on a CPU.
    disk
        Space where the output goes; None without an output.
    """

    host: int | None
    device: int | None
    disk: int | None


def capacity_of(device: torch.device, output: Path | None) -> Capacity:
    """What is free now, this process given back."""
    return Capacity(
        free_host(),
        None if device.type == "cpu" else free_device(device),
        None if output is None else free_disk(output),
    )


def free_host() -> int | None:
    """Bytes of host memory that a process could have in the place of this one."""
    available = free_memory()
    return None if available is None else available + own_memory()


def own_memory() -> int:
    """Bytes that this process has for itself alone; 0 where the system does not say."""
    try:
        with Path("/proc/self/status").open(encoding="ascii") as lines:
            found = next(line for line in lines if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return 0
    return int(found.split()[1]) * 1024


def free_device(device: torch.device) -> int | None:
    """Bytes of memory that are free on an accelerator."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raise if what a run will write into a folder is more than its disk has.

    Parameters
    ----------
    folder
        The partial folder; what a run that is continued has written counts.
    needed
        Bytes of all that will be there.
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

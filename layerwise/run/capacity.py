"""What this machine has left: memory of the host and of a device, space on a disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch


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
    available = _kibibytes(Path("/proc/meminfo"), "MemAvailable")
    return None if available is None else available + own_memory()


def own_memory() -> int:
    """Bytes that this process has for itself alone; 0 where the system does not say."""
    return _kibibytes(Path("/proc/self/status"), "RssAnon") or 0


def free_device(device: torch.device) -> int | None:
    """Bytes of memory that are free on an accelerator."""
    if device.type != "cuda":
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def free_disk(path: Path) -> int | None:
    """Bytes on the disk that will hold a path, which need not exist."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _kibibytes(path: Path, key: str) -> int | None:
    """A line ``key: number kB`` of a file of the kernel, in bytes."""
    try:
        with path.open(encoding="ascii") as lines:
            for line in lines:
                name, _, rest = line.partition(":")
                if name == key:
                    return int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None

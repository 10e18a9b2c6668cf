"""Jobs for workers; a module of its own, so that a worker imports no test to find them."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import DataError, SolveError
from layerwise.run.workers.messages import Work, WorkerSpec


class Fickle(Exception):
    """Cannot be copied by pickle: it needs two arguments and remembers one."""

    def __init__(self, layer: int, cause: str) -> None:
        super().__init__(f"layer {layer} is {cause}")


class Unreadable:
    """A payload or a value that breaks when it is read."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def squares(spec: WorkerSpec) -> Work:
    """Square numbers, and say on which worker."""
    opened = os.getpid()

    def work(payload: int) -> dict[str, Any]:
        same = opened == os.getpid()
        return {"value": payload**2, "spec": spec, "pid": opened, "same": same} | {
            "threads": torch.get_num_threads()
        }

    return work


def troubles(spec: WorkerSpec) -> Work:
    """Raise or return as the payload says."""

    def work(payload: Any) -> Any:
        match payload:
            case "solve error":
                message = "layer 3 has no answer"
                raise SolveError(message)
            case "fickle":
                raise Fickle(3, "moody")
            case "local":
                return lambda: None
            case "unreadable":
                return Unreadable()
            case "ctrl-c":
                os.kill(os.getpid(), signal.SIGINT)
        return payload

    return work


def first_time(flag: str) -> bool:
    """Whether this is the first call with this path."""
    try:
        Path(flag).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def suicides(spec: WorkerSpec) -> Work:
    """Die when a flag is raised for the first time, and return the time of death later."""

    def work(flag: str) -> float:
        if first_time(flag):
            Path(flag).write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        return float(Path(flag).read_text())

    return work


def sleepers(spec: WorkerSpec) -> Work:
    """Leave the process number in a folder, and sleep."""

    def work(folder: str) -> None:
        (Path(folder) / f"{os.getpid()}.pid").touch()
        time.sleep(600)

    return work


def closed_shop(spec: WorkerSpec) -> Work:
    """No worker opens."""
    message = "the model folder is gone"
    raise DataError(message)

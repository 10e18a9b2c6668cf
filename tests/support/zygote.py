"""A process that has imported everything and forks a child for every run of a test.

``python -m tests.support.zygote`` reads one request per line, a JSON object with the
arguments of :func:`layerwise.prune_model` and, as ``fatal``, the number of the point at
which the child kills itself with SIGKILL, or null. It answers with one line: the signal
that ended the child, or the points that the child passed and the error that ended its run.

A point is named after a stage of a run. Stages of the stopwatch have one where they begin;
those that begin once also have one at every tensor they read and one at their end. A file
has three: its temporary file is there and empty, it is complete, it has its name.
"""

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import LayerwiseError
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.prune import prune_model
from layerwise.run.stopwatch import Stopwatch
from tests.support.models import random_tokens, tiny_model

FAMILIES = ("opt", "llama", "mamba")
ONCE = {"load": "load", "hash": "load", "capture": "capture"}  # stage -> its points
OFTEN = ("forward", "gram", "solve")
TEMPORARY = re.compile(r"\.(.+?)(\.\d+-\w+)?\.tmp")


def stage_of_file(path: Path) -> str:
    """Name of the points of a file that gets its name atomically."""
    if path.name == "fingerprint.json":
        return "load"
    if path.name.startswith("hidden-"):
        return "forward"
    if path.parent.name == "blocks":
        return "block"
    shard = path.suffix == ".safetensors" and path.parent.name != "layerwise"
    return "shard" if shard else "manifest"


class Points(Stopwatch):
    """Names the points that a run passes, and kills the process at one of them."""

    def __init__(self, fatal: int | None) -> None:
        super().__init__()
        self.passed: list[str] = []
        self._fatal = fatal

    def reach(self, name: str) -> None:
        """Pass a point, or die at it."""
        if len(self.passed) == self._fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed.append(name)

    def reach_inside(self) -> None:
        """Pass a point in the stage that runs now, if that begins only once."""
        if self._open and self._open[-1] in ONCE:
            self.reach(ONCE[self._open[-1]])

    def _begin(self, name: str) -> None:
        super()._begin(name)
        self.reach_inside()
        if name in OFTEN:
            self.reach(name)

    def _end(self) -> None:
        self.reach_inside()
        super()._end()


def watch(points: Points) -> None:
    """Make reads of tensors and renamings of files pass points, until the process ends."""
    tensors, fsync = Checkpoint.tensors, os.fsync
    written: list[str] = []  # stage of the file that is being written

    def read(
        self: Checkpoint, names: Iterable[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        for item in tensors(self, names):
            points.reach_inside()
            yield item

    def create(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        stream = original_open(self, mode, *rest, **more)
        if mode == "wb" and (match := TEMPORARY.fullmatch(self.name)):
            written[:] = [stage_of_file(self.with_name(match[1]))]
            points.reach(written[0])
        return stream

    def flush(descriptor: int) -> None:
        if written:
            points.reach(written[0])
        fsync(descriptor)

    def name(self: Path, target: Path) -> Path:
        result = original_replace(self, target)
        points.reach(written.pop())
        return result

    original_open, original_replace = Path.open, Path.replace
    patches: dict[Any, dict[str, Any]] = {
        Checkpoint: {"tensors": read},
        Path: {"open": create, "replace": name},
        os: {"fsync": flush},
    }
    for owner, functions in patches.items():
        for own, function in functions.items():
            setattr(owner, own, function)
    _watch_renaming(points)


def _watch_renaming(points: Points) -> None:
    """Points around every renaming of a folder, and before what is deleted after it."""
    rename, begun = Path.rename, list[bool]()

    def move(self: Path, target: Path) -> Path:
        begun.append(True)
        points.reach("rename")
        result = rename(self, target)
        points.reach("rename")
        return result

    def counted(remove: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any, **options: Any) -> None:
            if begun:
                points.reach("rename")
            remove(*arguments, **options)

        return wrapped

    Path.rename = move  # type: ignore[assignment,method-assign]
    for own in ("unlink", "rmdir"):
        setattr(os, own, counted(getattr(os, own)))


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run to the end, or to the fatal point."""
    points, error = Points(request["fatal"]), None
    watch(points)
    try:
        with points:
            prune_model(calibration=random_tokens(6, 12), **request["arguments"])
    except LayerwiseError as failure:
        error = str(failure)
    except BaseException:
        error = traceback.format_exc()
    return {"signal": None, "passed": points.passed, "error": error}


def fork(request: dict[str, Any]) -> dict[str, Any]:
    """Run in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writing, "w") as stream:
                json.dump(run(request), stream)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        answer = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"signal": os.WTERMSIG(status)}
    return dict(json.loads(answer))


def main() -> None:
    """Serve until the input ends."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for family in FAMILIES:  # imports what a run imports
        prune_model(
            tiny_model(family),
            "wanda",
            0.5,
            calibration=random_tokens(2, 12),
            n_sequences=2,
            sequence_length=12,
        )
    for line in sys.stdin:
        sys.stdout.write(json.dumps(fork(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

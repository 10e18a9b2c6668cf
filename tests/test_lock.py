"""Two runs for one output: the second one is refused at once, and nothing is mixed."""

import errno
import fcntl
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import UsageError
from layerwise.grams.collect_grams import collect_grams
from layerwise.grams.solve_grams import solve_grams
from layerwise.recovery.retrain import retrain_model
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline import lock
from layerwise.run.pipeline.lock import lock_path, locked
from layerwise.run.prune import prune_model
from tests.support.folders import files_of
from tests.support.models import differing, random_tokens, save_checkpoint, tiny_model

DATA: Any = {"calibration": random_tokens(4, 12), "n_sequences": 4, "sequence_length": 12}
REFUSED = r"another run is writing .*out \(process \d+ on .*\): wait until it ends"
# holds the lock of a file and waits to be killed; needs nothing of layerwise
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 1 on another"); file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("lock") / "model", tiny_model("llama"))


def prune(source: Path, out: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, **DATA}
    return prune_model(source, output_dir=out, **{**arguments, **options})


COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "prune": prune,
    "prune --no-resume": lambda source, out: prune(source, out, resume=False),
    "prune --force": lambda source, out: prune(source, out, force=True),
    "retrain": lambda source, out: retrain_model(source, output_dir=out, **DATA),
    "calibrate": lambda source, out: collect_grams(source, out, **DATA),
    "solve": lambda source, out: solve_grams(source, "wanda", 0.5, output_dir=out),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
@pytest.mark.parametrize("parent", ["", "new/folder"])
def test_every_command_is_refused_while_a_run_writes(
    source: Path, tmp_path: Path, command: Callable[[Path, Path], Any], parent: str
) -> None:
    out = tmp_path / parent / "out"
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out), pytest.raises(UsageError, match=REFUSED) as caught:
        command(source, out)
    assert "\n" not in str(caught.value)
    assert list(out.parent.iterdir()) == []


class Nested:
    """Callback that starts a second run for the same output, with other settings."""

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start, self.errors = start, list[str]()

    def on_start(self, n_layers: int) -> None: ...

    def on_layer(self, record: Any) -> None:
        with pytest.raises(UsageError) as caught:
            self._start()
        self.errors.append(str(caught.value))

    def on_finish(self, report: Any) -> None: ...


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_inside_a_run_is_refused(source: Path, tmp_path: Path, resume: bool) -> None:
    prune(source, tmp_path / "whole")
    out = tmp_path / "out"
    nested = Nested(lambda: prune(source, out, sparsity=0.75, resume=resume))
    prune(source, out, callbacks=[nested])
    assert nested.errors
    assert all("another run is writing" in error for error in nested.errors)
    assert not differing(files_of(out), files_of(tmp_path / "whole"))
    assert all(check.holds for check in verify(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    path = lock_path(tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_lock_ends_with_its_process(
    source: Path, tmp_path: Path, holder: "subprocess.Popen[str]"
) -> None:
    with pytest.raises(UsageError, match="process 1 on another"):
        prune(source, tmp_path / "out")
    holder.kill()
    holder.wait()
    assert lock_path(tmp_path / "out").exists()  # and is no obstacle
    prune(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_that_its_holder_just_removed_is_not_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "out", list[int]()
    flock = fcntl.flock

    def slow(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            lock_path(out).unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with locked(out):
        assert len(calls) == 2
        with pytest.raises(UsageError, match=REFUSED), locked(out):
            pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, None])
def test_a_file_system_without_locks_is_said(
    tmp_path: Path,
    number: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(number, "no locks")

    if number is None:  # nor has this system
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), locked(tmp_path / "out"):
        pass
    assert "start no second run for this output" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_other_outputs_are_free(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), locked(tmp_path / "out2"):
        pass

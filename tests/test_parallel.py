"""Workers give the bytes of a serial run, whatever happens to them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.cli import run
from layerwise.errors import SolveError, UsageError
from layerwise.run.pipeline.journal import Journal, read_layers
from layerwise.run.prune import prune_model
from layerwise.solve import solve
from tests.support.models import random_tokens, save_checkpoint, tiny_model

BLOCKS = 4
TOKENS = random_tokens(6, 12)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama", layers=BLOCKS, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("models") / "llama"
    return save_checkpoint(folder, model, max_shard_size="9KB")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prune(source: Any, out: Path | None = None, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "method": "wanda+least-squares",
        "sparsity": 0.5,
        "calibration": TOKENS,
        "n_sequences": 6,
        "sequence_length": 12,
        "output_dir": out,
    }
    return prune_model(source, **{**arguments, **options})


def files_of(folder: Path) -> dict[str, Any]:
    """Everything but the times."""
    files: dict[str, Any] = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "layers.jsonl"
    }
    records = [replace(record, seconds=0.0) for record in read_layers(folder)]
    return files | {"layers.jsonl": records}


class Slow:
    """Takes its time, so that there is somebody to kill."""

    name = "slow"

    def solve(self, problem: Any) -> Any:
        time.sleep(0.15)
        return solve(problem, "wanda")


class Failing:
    name = "failing"

    def solve(self, problem: Any) -> Any:
        solution = solve(problem, "wanda")
        if problem.shape[0] > problem.shape[1]:
            solution.weight.fill_(float("nan"))
        return solution


class Killer:
    """Kills all workers in the middle of a block, and remembers what was said."""

    def __init__(self) -> None:
        self.layers, self.killed, self.notes = 0, list[int](), list[str]()

    def on_note(self, text: str) -> None:
        self.notes.append(text)

    def on_start(self, n_layers: int) -> None: ...

    def on_layer(self, record: Any) -> None:
        self.layers += 1
        if self.layers == 7:  # the next block takes a second
            threading.Timer(0.5, self.kill).start()

    def kill(self) -> None:
        for worker in active_children():
            if worker.name.startswith("layerwise") and worker.pid is not None:
                self.killed.append(worker.pid)
                os.kill(worker.pid, signal.SIGKILL)

    def on_finish(self, report: Any) -> None: ...


@pytest.mark.parametrize(("mode", "count"), [("none", 2), ("block", 3)])
def test_any_number_of_workers_writes_the_same_bytes(
    source: Path, tmp_path: Path, mode: str, count: int
) -> None:
    prune(source, tmp_path / "serial", error_correction=mode)
    expected = files_of(tmp_path / "serial")
    out = tmp_path / "out"
    left: list[int] = []

    class Inputs:
        def on_start(self, n_layers: int) -> None: ...

        def on_layer(self, record: Any) -> None:
            left.append(len(list(tmp_path.rglob("inputs-*.safetensors"))))

        def on_finish(self, report: Any) -> None: ...

    watch = Inputs()
    report = prune(source, out, error_correction=mode, workers=count, callbacks=[watch])
    assert files_of(out) == expected
    assert left[0] > 0
    assert left[-1] == 0  # the inputs of a block go when it is done
    names = [f"{record.name}.weight" for record in report.records]
    assert names == list(report.masks)
    assert not out.with_name("out.partial").exists()


def test_killed_workers_change_nothing(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "serial", method=Slow())
    killer = Killer()
    out = tmp_path / "out"
    prune(source, out, method=Slow(), workers=2, callbacks=[killer])
    assert len(killer.killed) == 2
    assert any("lost its worker" in note for note in killer.notes)
    assert files_of(out) == files_of(tmp_path / "serial")


def test_a_run_of_one_kind_is_continued_by_the_other(source: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stopping:
        def __init__(self, layers: int) -> None:
            self.left = layers

        def on_start(self, n_layers: int) -> None: ...

        def on_layer(self, record: Any) -> None:
            self.left -= 1
            if not self.left:
                raise Stop

        def on_finish(self, report: Any) -> None: ...

    prune(source, tmp_path / "whole")
    for first, second in ((1, 2), (2, 1)):
        out = tmp_path / f"{first}{second}"
        with pytest.raises(Stop):  # a serial one in its second block
            prune(source, out, workers=first, callbacks=[Stopping(9)])
        journal = out.with_name(f"{out.name}.partial") / "layerwise" / "blocks"
        assert any(journal.glob("0000*.safetensors"))
        prune(source, out, workers=second)
        assert files_of(out) == files_of(tmp_path / "whole")


def test_finished_blocks_are_not_done_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs are written for those blocks only that are left."""
    from layerwise.run.pipeline import parallel

    with pytest.raises(SolveError):
        prune(source, tmp_path / "out", method=Failing(), workers=2)
    prune(source, tmp_path / "whole")
    asked: list[int] = []
    original = parallel.write_hidden

    def counting(folder: Path, index: int, hidden: Any) -> None:
        asked.append(index)
        original(folder, index, hidden)

    monkeypatch.setattr(parallel, "write_hidden", counting)
    finish: Callable[..., Any] = Journal.finish
    monkeypatch.setattr(Journal, "finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune(source, tmp_path / "again", workers=2)
    assert asked == list(range(BLOCKS))
    monkeypatch.setattr(Journal, "finish", finish)
    prune(source, tmp_path / "again", workers=2)
    assert asked == list(range(BLOCKS))
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")


def test_an_error_in_a_worker_keeps_its_type_and_its_layer(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(SolveError, match=r"^model\.layers\.\d\.mlp\.gate_proj: failing"):
        prune(source, tmp_path / "out", method=Failing(), workers=2)
    assert not (tmp_path / "out").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "sequential": ({"error_correction": "sequential"}, "waits for the one before it"),
    "full": ({"error_correction": "full"}, "waits for the one before it"),
    "none": ({"workers": 0}, "workers must be at least 1"),
    "gradients": ({"method": "gblm"}, "needs no gradients"),
    "channels": ({"method": "fasp"}, "removes no channels"),
    "no output": ({"output_dir": None}, "give a path and an output_dir"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_split_is_refused(
    options: dict[str, Any], message: str, source: Path, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"workers": 2, "output_dir": tmp_path / "out"}
    with pytest.raises(UsageError, match=message):
        prune(source, **{**arguments, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_cannot_be_sent_is_refused(source: Path, tmp_path: Path) -> None:
    class Local:
        def solve(self, problem: Any) -> Any:
            return solve(problem, "wanda")

    with pytest.raises(UsageError, match="cannot be sent to workers"):
        prune(source, tmp_path / "out", method=Local(), workers=2)
    assert list(tmp_path.iterdir()) == []


def test_a_model_object_stays_in_one_process() -> None:
    with pytest.raises(UsageError, match="give a path"):
        prune(tiny_model("llama"), workers=2)


@pytest.mark.parametrize(
    "where", [["--workers", "2"], ["--workers", "2", "--ray", "local"]]
)
def test_command(
    where: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("bad cab fed a bag of beef. " * 80)
    common = ["prune", str(source), "--method", "wanda", "--sparsity", "2:4"]
    common += ["--calibration", str(text), "--n-sequences", "4", "--sequence-length", "16"]
    assert run([*common, "--output", str(tmp_path / "one"), "--threads", "1"]) == 0
    out = tmp_path / "two"
    assert run([*common, "--output", str(out), "--threads", "1", *where]) == 0
    assert f"[{7 * BLOCKS}/{7 * BLOCKS}]" in capsys.readouterr().err
    expected, found = files_of(tmp_path / "one"), files_of(out)
    for name in ("layerwise/report.html",):  # tells times
        expected.pop(name)
        found.pop(name)
    assert found == expected
    assert run(["verify", str(out)]) == 0

"""Streams of a command that are closed, full or not read: progress is never a failure."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import layerwise
from layerwise.cli import run
from layerwise.cli.streams import Lasting, lasting
from layerwise.demo import model_path
from layerwise.errors import DataError
from tests.support.models import tiny_text

FULL = Path("/dev/full")
full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def shell(line: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a line of shell, in which `lw` is the command."""
    command = f'lw() {{ "{sys.executable}" -m layerwise "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(Path(layerwise.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def prune(output: str) -> str:
    method = "--method magnitude --sparsity 0.5 --threads 1"
    sizes = "--n-sequences 2 --sequence-length 16 --calibration text.txt"
    return f"lw prune {model_path('opt')} {method} {sizes} --output {output}"


@full
def test_lost_progress_does_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny_text())
    line = f"""
    {prune("out")} 2>&1 >/dev/null | head -1 >/dev/null; echo ${{PIPESTATUS[0]}}
    lw solvers >/dev/full; echo $?
    PYTHONUNBUFFERED=1 lw --version >/dev/full; echo $?
    """
    ended = shell(line, tmp_path)
    assert ended.stdout.split() == ["0", "6", "6"]
    assert (tmp_path / "out" / "config.json").is_file()
    lost = "results cannot be written to stdout: [Errno 28]"
    assert ended.stderr.count("\n") == ended.stderr.count(lost) == 2


class Broken(io.StringIO):
    """A stream whose file is lost after some characters."""

    def __init__(self, after: int, error: Exception) -> None:
        super().__init__()
        self._left, self._error = after, error

    def write(self, text: str) -> int:
        self._left -= len(text)
        if self._left < 0:
            raise self._error
        return super().write(text)


ERRORS = [BrokenPipeError(32, "Broken pipe"), OSError(28, "full"), ValueError("closed")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_progress_survives_and_results_do_not(error: Exception) -> None:
    progress = Lasting(Broken(4, error), results=False)
    assert [progress.write(text) for text in ("abcd", "e", "f")] == [4, 1, 1]
    progress.flush()
    assert not progress.isatty()
    results = Lasting(Broken(4, error), results=True)
    results.write("abcd")
    with pytest.raises(DataError, match="results cannot be written to stdout"):
        results.write("e")
    with pytest.raises(DataError, match="results cannot be written to stdout"):
        results.flush()  # if a library took no notice


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_takes_everything(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, name, None)
    assert run(["--version"]) == 0
    assert run(["verify", "nowhere"]) == 6
    assert getattr(sys, name) is None


def test_letters_that_an_encoding_lacks_are_escaped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    with lasting("stdout", results=True):
        sys.stdout.write("\N{GREEK SMALL LETTER ALPHA}\N{MULTIPLICATION SIGN}\n")
    assert raw.getvalue() == b"\\u03b1\xd7\n"


def test_a_stream_that_fails_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(DataError, match="No space left"), lasting("stdout", results=True):
        sys.stdout.write("results")

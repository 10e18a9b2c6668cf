"""Command line: one line for every bad input, the right exit code, and nothing left."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise
from layerwise.cli import run
from layerwise.reports.catalogue import catalogue
from layerwise.solution import Answer
from layerwise.solvers import SOLVERS
from layerwise.solvers.magnitude import Magnitude
from tests.support.command_line import (
    LINEARS,
    fill_workshop,
    flags,
    kept_in_order,
    one_line,
)
from tests.support.models import (
    POSITIONS,
    shard_hashes,
)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def in_workshop(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in the workshop; afterwards it must hold what it held before."""
    monkeypatch.chdir(workshop)
    with kept_in_order(workshop):
        yield workshop


# --- bad input ---------------------------------------------------------------------------

BAD: Mapping[str, tuple[Mapping[str, Any], int, str]] = {
    "sparsity above one": ({"--sparsity": "1.5"}, 2, "must lie in [0, 1), got 1.5"),
    "sparsity below zero": ({"--sparsity": "-0.1"}, 2, "must lie in [0, 1), got -0.1"),
    "sparsity a word": ({"--sparsity": "abc"}, 2, "fraction (0.5) or n:m (2:4), got 'abc'"),
    "sparsity nan": ({"--sparsity": "nan"}, 2, "got nan"),
    "pattern impossible": ({"--sparsity": "5:4"}, 2, "0 < n <= m; got 5:4"),
    "pattern of zero": ({"--sparsity": "0:4"}, 2, "got 0:4"),
    "pattern unfinished": ({"--sparsity": "2:"}, 2, "got '2:'"),
    "width": (
        {"MODEL": "odd", "--sparsity": "2:4"},
        2,
        "model.layers.0.mlp.down_proj: pattern 2:4 needs a width divisible by 4",
    ),
    "group of a pattern": (
        {"--sparsity": "2:4", "--group": "layer"},
        2,
        "group layer cannot be combined with the pattern 2:4: leave one of them out",
    ),
    "group": ({"--group": "column"}, 2, "group: Input should be 'row' or 'layer'"),
    "method": ({"--method": "sparsgpt"}, 2, "did you mean sparsegpt"),
    "method unlike any": ({"--method": "zzz"}, 2, "Known: magnitude, wanda"),
    "chain": ({"--method": "wanda+lest-squares"}, 2, "did you mean least-squares"),
    "mask": ({"--method": "least-squares"}, 2, '"wanda+least-squares"'),
    "option": ({"--set": "blocks=3"}, 2, "wanda has no option 'blocks'"),
    "effort": ({"--effort": "fast"}, 2, "wanda has no option 'effort'"),
    "effort value": (
        {"--method": "best", "--effort": "much"},
        2,
        "option effort of best: Input should be 'fast', 'balanced' or 'thorough'",
    ),
    "option syntax": ({"--set": "block_size"}, 2, "--set takes name=value"),
    "option without name": ({"--set": "=3"}, 2, "--set takes name=value"),
    "option value": ({"--set": "x=[1"}, 2, "--set x takes one number or word"),
    "option list": ({"--set": "x=[1, 2]"}, 2, "options.x"),
    "mode": ({"--error-correction": "all"}, 2, "'sequential', 'block' or 'full'"),
    "damping": ({"--damping": "-1"}, 2, "damping must be a number >= 0"),
    "targets": ({"--targets": "Conv2d"}, 2, "'Conv2d' matches nothing in model.layers.0"),
    "ignore": ({"--ignore": "q_proj"}, 2, "ignore entry 'q_proj' matches nothing"),
    "everything ignored": ({"--ignore": "Linear"}, 2, "nothing is left to prune"),
    "regular expression": ({"--targets": "re:("}, 2, "is not a regular expression"),
    "threads": ({"--threads": "0"}, 2, "--threads must be at least 1, got 0"),
    "number": ({"--seed": "x"}, 2, "--seed"),
    "seed": ({"--seed": "-1"}, 2, "seed is -1"),
    "windows": ({"--n-sequences": "0"}, 2, "at least 1 window is needed"),
    "length": ({"--sequence-length": "1"}, 2, "at least 2 tokens are needed"),
    "too long": ({"--sequence-length": "33"}, 2, f"exceeds the {POSITIONS} positions"),
    "device": ({"--device": "abacus"}, 2, "device 'abacus' cannot be used"),
    "no model": ({"MODEL": None}, 2, "missing MODEL"),
    "no sparsity": ({"--sparsity": None}, 2, "missing --sparsity"),
    "no calibration": ({"--calibration": None}, 2, "missing --calibration"),
    "no output": ({"--output": None}, 2, "missing --output"),
    "unknown flag": ({"--metod": "wanda"}, 2, "No such option: --metod"),
    "no recipe": ({"--recipe": "none.yaml"}, 2, "no recipe file none.yaml"),
    "bad recipe": ({"--recipe": "bad.yaml"}, 2, "unknown name 'methods'; known: model"),
    "source": ({"--calibration": "wikitext"}, 2, "did you mean 'wikitext2'"),
    "field": ({"--calibration": "text.jsonl:"}, 2, "needs a field, as in text.jsonl:field"),
    "no tokenizer": ({"MODEL": "mute"}, 2, "needs a tokenizer"),
    "experts": ({"MODEL": "mixture"}, 2, "model.layers.0.mlp.experts.gate_up_proj (a par"),
    "budget": (
        {"--method": "wanda+least-squares", "--memory-budget": "10"},
        5,
        "model.layers.0.self_attn.q_proj: one row of this refit needs",
    ),
    "text missing": ({"--calibration": "none.txt"}, 6, "cannot read none.txt"),
    "text empty": ({"--calibration": "empty.txt"}, 6, "empty.txt is empty"),
    "text short": ({"--calibration": "short.txt"}, 6, "a window needs 12"),
    "text binary": ({"--calibration": "binary.txt"}, 6, "binary.txt is not UTF-8"),
    "json lines": ({"--calibration": "bad.jsonl:text"}, 6, "bad.jsonl line 2 is not JSON"),
    "no such field": ({"--calibration": "text.jsonl:body"}, 6, "has no field 'body'"),
    "model missing": ({"MODEL": "./none"}, 6, "there is no folder ./none"),
    "model a file": ({"MODEL": "text.txt"}, 6, "text.txt is a file"),
    "below a file": ({"--output": "text.txt/out"}, 6, "text.txt is not writable"),
}


@pytest.mark.parametrize(("changes", "code", "expected"), BAD.values(), ids=list(BAD))
def test_bad_input(
    in_workshop: Path,
    changes: Mapping[str, Any],
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    threads = torch.get_num_threads()
    before = sorted(in_workshop.iterdir())
    assert run(flags(changes)) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines(keepends=True)
    if code == 5:  # found while solving, after the progress began
        assert lines[0] == f"pruning {LINEARS} layers\n"
        lines = lines[1:]
    assert expected in one_line("".join(lines))
    assert captured.out == ""
    assert sorted(in_workshop.iterdir()) == before
    assert torch.get_num_threads() == threads


def test_output_that_cannot_be_written(
    in_workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert run(flags({"--output": "deep/out"})) == 6
    assert "is not writable; choose another" in one_line(capsys.readouterr().err)
    assert not (in_workshop / "deep").exists()


def test_output_that_exists(in_workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (in_workshop / "out").mkdir()
    (in_workshop / "out" / "thesis.txt").write_text("precious")
    assert run(flags({})) == 2
    assert "replace it with --force" in one_line(capsys.readouterr().err)
    assert (in_workshop / "out" / "thesis.txt").read_text() == "precious"


def test_numerical_failure(
    in_workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Magnitude.solve

    def fail(self: Magnitude, *arguments: Any, **options: Any) -> Answer:
        answer = original(self, *arguments, **options)
        answer.weight.fill_(torch.nan)
        return answer

    monkeypatch.setattr(Magnitude, "solve", fail)
    assert run(flags({"--method": "magnitude"})) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert "model.layers.0.self_attn.q_proj: magnitude failed numerically" in error
    assert not (in_workshop / "out.partial").exists()


def test_interruption_keeps_what_is_finished(
    in_workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original, calls = Magnitude.solve, [0]

    def interrupt(self: Magnitude, *arguments: Any, **options: Any) -> Answer:
        calls[0] += 1
        if calls[0] == LINEARS - 1:
            signal.raise_signal(signal.SIGINT)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Magnitude, "solve", interrupt)
    assert run(flags({"--method": "magnitude"})) == 130
    assert capsys.readouterr().err.endswith(
        "layerwise: stopped after 1 of 2 blocks; run the same command to continue\n"
    )
    assert (in_workshop / "out.partial").is_dir()
    assert run(flags({"--method": "magnitude"})) == 0
    assert run(flags({"--method": "magnitude", "--output": "again"})) == 0
    assert shard_hashes(in_workshop / "out") == shard_hashes(in_workshop / "again")


def test_unfinished_run_with_other_flags(
    in_workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from layerwise.run.pipeline.journal import Journal

    Journal(in_workshop / "out", {"seed": 7})
    assert run(flags({})) == 2
    error = one_line(capsys.readouterr().err)
    assert "is an unfinished run with another" in error
    assert "--no-resume" in error
    assert run([*flags({}), "--no-resume"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["prun"], 2, "No such command 'prun'"),
        (["evaluate", "llama"], 2, "give --dataset, --tasks or --speed"),
        (["evaluate", "llama", "--compare", "odd"], 2, "give --dataset, --tasks"),
        (
            ["evaluate", "llama", "--dataset", "text.txt", "--compare", "odd"],
            2,
            "give --speed as well",
        ),
        (["evaluate", "nan", "--speed"], 6, "holds nan at [2, 3]"),
        (["evaluate", "llama", "--speed", "--compare", "cut"], 6, "not a usable safetens"),
        (["evaluate", "llama", "--speed", "--device", "abacus"], 2, "device 'abacus'"),
        (["bench"], 2, "give either a model folder or a shape"),
        (
            ["bench", "llama", "--shape", "opt-125m"],
            2,
            "give either a model folder or a shape",
        ),
        (["bench", "--shape", "opt"], 2, "unknown shape 'opt'; known: opt-125m"),
        (["bench", "llama", "--blocks", "1"], 2, "number of blocks of a shape"),
        (["bench", "--shape", "opt-125m", "--blocks", "0"], 2, "at least 1; got 0"),
        (["bench", "llama", "--threads", "0"], 2, "--threads must be at least 1, got 0"),
        (["bench", "llama", "--method", "wnada"], 2, "did you mean wanda"),
        (["bench", "llama", "--sparsity", "5:4"], 2, "got 5:4"),
        (["bench", "llama", "--n-sequences", "0"], 2, "n_sequences is 0"),
        (["bench", "./none"], 6, "there is no folder ./none"),
        (["evaluate"], 2, "Missing argument 'MODEL'"),
        (["evaluate", "mute", "--dataset", "text.txt"], 6, "mute has no tokenizer"),
        (["evaluate", "nan", "--dataset", "text.txt"], 6, "holds nan at [2, 3]"),
        (["evaluate", "llama", "--dataset", "none.txt"], 6, "cannot read none.txt"),
        (["evaluate", "llama", "--dataset", "short.txt"], 6, "one window needs 32"),
        (["evaluate", "llama", "--dataset", "x"], 2, "unknown text source 'x'"),
        (
            ["evaluate", "llama", "--dataset", "text.txt", "--sequence-length", "33"],
            2,
            "exceeds the 32 positions",
        ),
        (
            ["evaluate", "llama", "--dataset", "text.txt", "--device", "abacus"],
            2,
            "device 'abacus' cannot be used",
        ),
        (["verify", "llama"], 6, "it is not an output of layerwise"),
        (["verify", "none"], 6, "it is not an output of layerwise"),
        (["verify", "two\nlines"], 6, "two lines holds no layerwise/manifest.json"),
        (["report", "llama"], 6, "it is not an output of layerwise"),
        (["demo", "--output", "text.txt"], 6, "cannot create text.txt"),
        (["solvers", "more"], 2, "unexpected extra argument"),
    ],
)
def test_bad_input_of_other_commands(
    in_workshop: Path,
    arguments: list[str],
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(arguments) == code
    captured = capsys.readouterr()
    assert expected in one_line(captured.err)
    assert captured.out == ""


# --- what needs no model -----------------------------------------------------------------


def test_every_solver_has_a_summary_of_its_own() -> None:
    summaries = [entry.summary for entry in catalogue()]
    assert len(set(summaries)) == len(SOLVERS)
    assert all(summary.endswith(".") for summary in summaries)


def test_solvers_are_all_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["solvers"]) == 0
    first = [line.split()[:1] for line in capsys.readouterr().out.splitlines()]
    assert SOLVERS
    assert all([name] in first for name in SOLVERS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"layerwise {layerwise.__version__}\n"


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["prune", "--help"]) == 0
    printed = capsys.readouterr().out
    for flag in ("--error-correction", "--set", "--memory-budget", "--no-resume"):
        assert flag in printed


def test_no_command_shows_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    lines = capsys.readouterr().err.splitlines()
    commands = ("prune", "evaluate", "verify", "report", "bench", "solvers", "demo")
    assert all(any(line.split()[:1] == [name] for line in lines) for name in commands)


@pytest.mark.parametrize("front", [True, False])
def test_debug_shows_the_traceback(front: bool, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", "none"]
    assert run(["--debug", *arguments] if front else [*arguments, "--debug"]) == 6
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("layerwise: none holds no layerwise/manifest")


# --- real processes ----------------------------------------------------------------------


def process(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(layerwise.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_process_that_fails(workshop: Path) -> None:
    ended = process("-m", "layerwise", "verify", "llama", folder=workshop)
    assert ended.returncode == 6
    assert ended.stdout == ""
    error = ended.stderr.removeprefix("starting: PyTorch is being imported\n")
    assert one_line(error).endswith("it is not an output of layerwise\n")


KILLED = """
import os, signal, sys
from layerwise.cli import run
from layerwise.run.pipeline.journal import Journal

def die(journal, index, block, write=Journal.write_block):
    write(journal, index, block)
    os.kill(os.getpid(), signal.SIGKILL)

Journal.write_block = die
run(sys.argv[1:])
"""


def test_process_that_is_killed_can_be_resumed(in_workshop: Path) -> None:
    arguments = flags({"--method": "sparsegpt", "--threads": "1"})
    ended = process("-c", KILLED, *arguments, folder=in_workshop)
    assert ended.returncode == -signal.SIGKILL
    assert not Path("out").exists()
    assert len(list(Path("out.partial/layerwise/blocks").iterdir())) == 1
    assert run(arguments) == 0
    assert run(flags({"--method": "sparsegpt", "--output": "again"})) == 0
    assert shard_hashes(Path("out")) == shard_hashes(Path("again"))

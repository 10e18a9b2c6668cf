"""Good runs of the commands, from flags to files."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from layerwise.cli import run
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.perplexity import perplexity
from layerwise.run.data.tokens import encode
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import load_model
from layerwise.run.pipeline.journal import read_layers
from tests.support.command_line import LINEARS, fill_workshop, flags, kept_in_order
from tests.support.models import SHARD, shard_hashes


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def in_workshop(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in the workshop; afterwards it must hold what it held before."""
    monkeypatch.chdir(workshop)
    with kept_in_order(workshop):
        yield workshop


def test_prune_verify_report_evaluate(
    in_workshop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    assert run(flags({"--method": "wanda+least-squares", "--threads": threads})) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == f"pruning {LINEARS} layers"
    for index, record in enumerate(read_layers(Path("out")), start=1):
        rows, width = record.shape
        expected = (
            rf"\[{index}/{LINEARS}\]( about \d+ s left)?  {re.escape(record.name)}  "
            rf"{rows}x{width}  "
            rf"sparsity 0\.5000  relative error {record.relative_error:.4f}  feasible  "
            rf"refit <= \d\.\de-\d\d  damping 0\.01  rank {record.rank}/{width}  "
            rf"\d+\.\d\d s"
        )
        assert re.fullmatch(expected, lines[index]), lines[index]
    assert lines[LINEARS + 1].startswith(
        f"{LINEARS} layers, sparsity 0.5000, mean relative"
    )
    assert len(lines) == LINEARS + 2
    assert run(["verify", "out"]) == 0
    assert capsys.readouterr().out.count("ok  ") == 9

    page = Path("out/layerwise/report.html")
    written = page.read_text()
    assert "wanda+least-squares" in written.replace("<wbr>", "")
    page.unlink()
    assert run(["report", "out"]) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert page.read_text() == written
    assert run(["report", "out", "--output", "out/other.html"]) == 0
    assert Path("out/other.html").read_text() == written
    capsys.readouterr()

    arguments = ["evaluate", "out", "--dataset", "text.txt", "--sequence-length", "16"]
    assert run(arguments) == 0
    checkpoint = Checkpoint.open("out")
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    tokens = encode(Path("text.txt").read_text(), tokenizer)
    expected_value = perplexity(load_model(checkpoint), tokens, sequence_length=16)
    assert capsys.readouterr().out == (
        f"perplexity {expected_value:.4f}  (text.txt, {len(tokens) // 16} windows of 16 "
        f"tokens, contiguous)\n"
    )


def test_speed(in_workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alone, beside another model, and after the perplexity."""
    assert run(["evaluate", "llama", "--speed"]) == 0
    alone = capsys.readouterr().out
    assert "prefill 16 x 32" in alone
    assert "ratio" not in alone
    arguments = ["evaluate", "llama", "--dataset", "text.txt", "--speed"]
    assert run([*arguments, "--compare", "odd"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("perplexity ")
    assert lines[1].split() == ["llama", "odd", "ratio"]
    assert lines[2].split()[0] == "parameters"


def test_bench(in_workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    arguments = ["bench", "llama", "--method", "sparsegpt", "--sparsity", "2:4"]
    arguments += ["--n-sequences", "2", "--sequence-length", "12", "--device", "cpu"]
    assert run([*arguments, "--threads", str(threads)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.startswith("llama: sparsegpt 2:4, 2 x 12 tokens")
    for name in ("load", "capture", "forward", "gram", "solve", "write", "all"):
        assert any(line.split()[:1] == [name] for line in captured.out.splitlines())


def test_recipe_repeats_the_run(in_workshop: Path) -> None:
    arguments = flags(
        {
            "--method": "wanda+least-squares",
            "--sparsity": "2:4",
            "--error-correction": "full",
            "--seed": "3",
            "--damping": "0.02",
            "--set": "tolerance=1e-4",
            "--targets": "re:.*_proj",
            "--ignore": "re:.*k_proj",
            "--calibration": "text.jsonl:text",
        }
    )
    assert run(arguments) == 0
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert recipe["options"] == {"least-squares.tolerance": 1e-4}
    assert run(["prune", "--recipe", "out/recipe.yaml", "--output", "again"]) == 0
    assert shard_hashes(Path("out")) == shard_hashes(Path("again"))
    assert Path("out/recipe.yaml").read_bytes() == Path("again/recipe.yaml").read_bytes()


def test_effort_is_an_option_of_the_method(in_workshop: Path) -> None:
    assert run(flags({"--method": "best", "--effort": "fast"})) == 0
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert recipe["options"] == {"effort": "fast"}


@pytest.mark.parametrize(
    ("method", "flag", "proven"),
    [
        ("wanda", "--certify", True),
        ("best", None, True),
        ("best", "--no-certify", False),
    ],
)
def test_gaps_are_proven_if_asked_for_or_thorough(
    method: str, flag: str | None, proven: bool, in_workshop: Path
) -> None:
    effort = "thorough" if method == "best" else None
    few = {"--targets": "re:.*1.*q_proj", "--method": method, "--effort": effort}
    assert run([*flags(few), *([flag] if flag else [])]) == 0
    for record in read_layers(Path("out")):
        assert (record.proven_gap is not None) == proven
    assert ("proven gap" in Path("out/layerwise/report.html").read_text()) == proven


def test_flags_win_over_the_recipe(in_workshop: Path) -> None:
    changes = {"--recipe": "recipe.yaml", "--sparsity": None, "--n-sequences": None}
    assert run(flags({**changes, "--method": "magnitude"})) == 0
    recipe = yaml.safe_load(Path("out/recipe.yaml").read_text())
    assert (recipe["method"], recipe["sparsity"]) == ("magnitude", "2:4")
    assert recipe["n_sequences"] == 4
    assert {record.pattern for record in read_layers(Path("out"))} == {"2:4"}


def test_group_reaches_the_pattern(in_workshop: Path) -> None:
    assert run(flags({"--group": "layer", "--method": "magnitude"})) == 0
    weight = load_file(Path("out") / SHARD)["model.layers.0.mlp.up_proj.weight"]
    zeros = (weight == 0).sum(dim=1)
    assert int(zeros.sum()) == weight.numel() // 2
    assert len(set(zeros.tolist())) > 1
    assert run(["verify", "out"]) == 0


def test_targets_may_repeat(in_workshop: Path) -> None:
    more = ["--targets", "re:.*q_proj", "--targets", "re:.*up_proj", "--ignore", "lm_head"]
    assert run([*flags({}), *more]) == 0
    names = {record.name.rpartition(".")[2] for record in read_layers(Path("out"))}
    assert names == {"q_proj", "up_proj"}


def test_force_replaces(in_workshop: Path) -> None:
    assert run(flags({})) == 0
    assert run([*flags({"--sparsity": "2:4"}), "--force"]) == 0
    assert {record.pattern for record in read_layers(Path("out"))} == {"2:4"}


def test_report_is_optional(
    in_workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(flags({})) == 0
    assert "report.html was not written" in capsys.readouterr().err
    assert run(["verify", "out"]) == 0

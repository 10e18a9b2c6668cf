"""Options: one declaration each, help in groups, and a plan that takes a prune's line."""

import inspect
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.main import get_command

from layerwise.cli import COMMANDS, GROUPED, app, run
from layerwise.cli.help import EXAMPLES, GROUPS, OTHERS
from layerwise.cli.run_flags import RunFlags
from layerwise.planning import plan as plan_module
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.prune import prune_model
from tests.support.models import save_checkpoint, tiny_model, tiny_text

NAMES = [command.__name__ for command in COMMANDS]
WIDTH = 80
MINIMUM = 5  # of words that say what an option is


def command_of(name: str) -> Any:
    commands: dict[str, Any] = vars(get_command(app))["commands"]
    return commands[name]


def parse(line: str) -> dict[str, Any]:
    """Values of the parameters that a line in a shell gives to its command."""
    program, name, *arguments = shlex.split(line.replace("\\\n", " "))
    assert program == "layerwise"
    values: dict[str, Any] = command_of(name).make_context(name, arguments).params
    return values


def help_page(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert run([name, "--help"]) == 0
    return capsys.readouterr().out


# --- declarations ------------------------------------------------------------------------


def test_plan_takes_the_options_of_prune_and_json() -> None:
    def parameters(name: str) -> list[tuple[Any, ...]]:
        return [
            (p.name, p.opts, p.secondary_opts, p.default, p.help, p.metavar)
            for p in command_of(name).params
        ]

    *shared, last = parameters("plan")
    assert shared == parameters("prune")
    assert last[0] == "json_"


def test_an_option_has_one_help_text() -> None:
    texts: dict[str, set[str]] = {}
    for name in NAMES:
        for parameter in command_of(name).params:
            for flag in parameter.opts:
                texts.setdefault(flag, set()).add(parameter.help)
    assert len(texts) > 40
    assert {flag: found for flag, found in texts.items() if len(found) > 1} == {}


def test_options_of_a_run_are_the_arguments_of_prune_model() -> None:
    flags = inspect.signature(RunFlags).parameters
    arguments = inspect.signature(prune_model).parameters
    only_python = {"model_or_path", "tokenizer", "options", "output_dir", "callbacks"}
    only_typed = {"model", "recipe", "set_", "effort", "threads", "output"}
    assert set(arguments) - set(flags) == only_python
    assert set(flags) - set(arguments) == only_typed


def test_defaults_in_the_help_are_those_of_a_recipe_and_of_prune_model() -> None:
    """A recipe decides what is not typed; the signature only shows it."""
    recipe = Recipe().model_dump()
    arguments = inspect.signature(prune_model).parameters
    for name, parameter in inspect.signature(RunFlags).parameters.items():
        if name in ("targets", "ignore"):
            shown = {p.name: p.show_default for p in command_of("prune").params}[name]
            assert [shown] == recipe[name]
        elif name in recipe:
            assert parameter.default == recipe[name], name
        elif name in arguments:
            assert parameter.default == arguments[name].default, name


# --- help --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_longer_than_a_terminal(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = help_page(name, monkeypatch, capsys)
    assert [line for line in page.splitlines() if len(line) > WIDTH] == []


@pytest.mark.parametrize("command", GROUPED)
def test_options_are_in_groups(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In order; no group is empty, and only ``--help`` is in none."""
    page = help_page(command.__name__, monkeypatch, capsys)
    headings = [line[:-1] for line in page.splitlines() if line[:1] > " " and ":" in line]
    headings = [heading for heading in headings if not heading.startswith("Usage")]
    if command.__name__ in EXAMPLES:
        assert headings.pop() == "Examples"
    assert headings == [group for group in (*GROUPS, OTHERS) if group in headings]
    assert len(headings) >= 4
    others = page.partition(f"\n{OTHERS}:\n")[2].partition("\n\n")[0]
    assert others.split()[0] == "--help"
    assert others.count("\n") <= 1
    for parameter in command_of(command.__name__).params:
        shown = parameter.metavar if parameter.param_type_name == "argument" else None
        assert parameter.hidden or f"\n  {shown or parameter.opts[0]}" in page


def test_groups_of_prune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = help_page("prune", monkeypatch, capsys)
    groups = ("Model", "Method", "Calibration", "Machine", "Output")
    starts = [page.index(f"\n{group}:\n  ") for group in groups]
    assert starts == sorted(starts)
    first, second = page.index("\n  --n-sequences"), page.index("\n  --workers")
    assert starts[2] < first < starts[3] < second < starts[4]
    assert "[default: fista]" in page
    assert "--unit" not in page


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_printed_and_parse(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = help_page(name, monkeypatch, capsys).partition("\nExamples:\n")[2]
    lines = printed.replace("\\\n", " ").splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.split()[:2] == ["layerwise", name]
        values = parse(line)
        assert values["sparsity"] not in (None, [])
        if name == "prune":
            assert values["calibration"]
            assert values["output"] is not None


def test_every_command_has_one_plain_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert run(["--help"]) == 0
    page = capsys.readouterr().out.partition("Commands:\n")[2]
    assert [line.split()[0] for line in page.splitlines()] == NAMES
    for line in page.splitlines():
        assert line.endswith(".")
        assert not line.endswith("...")
        assert len(line.split()) > MINIMUM


# --- runs --------------------------------------------------------------------------------


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model and texts, in which a command runs."""
    save_checkpoint(tmp_path / "llama", tiny_model("llama", dtype=torch.bfloat16))
    (tmp_path / "text.txt").write_text(tiny_text())
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": tiny_text()}) + "\n")
    (tmp_path / "body.jsonl").write_text(json.dumps({"body": tiny_text()}) + "\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    shutil.rmtree(tmp_path)


LINE = shlex.split(
    "llama --method sparsegpt --sparsity 0.5 --group row --error-correction none "
    "--targets Linear --ignore re:.*k_proj --set block_size=8 --calibration text.txt "
    "--n-sequences 4 --sequence-length 12 --seed 3 --damping 0.02 --no-certify "
    "--device cpu --threads 1 --workers 1 --activations memory --memory-budget 1000000 "
    "--output out --no-resume"
)


def test_one_line_is_planned_then_pruned_then_in_the_way(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(in_folder.rglob("*"))
    assert run(["plan", *LINE]) == 0
    planned = capsys.readouterr().out
    assert "sparsegpt" in planned
    assert sorted(in_folder.rglob("*")) == before
    assert run(["prune", *LINE]) == 0
    after = sorted(in_folder.rglob("*"))
    assert in_folder / "out" / "model.safetensors" in after
    capsys.readouterr()
    assert run(["plan", *LINE]) == 2
    caught = capsys.readouterr()
    assert caught.err == (
        "layerwise: out exists; choose another output, or replace it with --force "
        "(force=True)\n"
    )
    assert run(["plan", *LINE, "--force"]) == 0
    assert sorted(in_folder.rglob("*")) == after


def test_a_plan_reads_the_recipe_of_a_run_and_flags_win(
    in_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    original = plan_module.plan_run

    def plan_run(model: Any, **arguments: Any) -> Any:
        asked.append({"model": model, **arguments})
        return original(model, **arguments)

    monkeypatch.setattr(plan_module, "plan_run", plan_run)
    recipe = {"model": "llama", "method": "wanda", "sparsity": "2:4", "n_sequences": 4}
    (in_folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    # a default that is typed wins as well
    arguments = ["--recipe", "recipe.yaml", "--n-sequences", "128", "--device", "cpu"]
    assert run(["plan", *arguments]) == 0
    (found,) = asked
    assert (found["model"], found["method"], found["sparsity"]) == ("llama", "wanda", "2:4")
    assert found["n_sequences"] == 128
    assert found["error_correction"] == "block"


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        (["--calibration", "none.txt"], 6, "cannot read none.txt: No such file"),
        (["--calibration", "none.jsonl:text"], 6, "cannot read none.jsonl: No such file"),
        (["--calibration", "wikitext"], 2, "did you mean 'wikitext2'"),
        (["--calibration", "body.jsonl"], 2, "needs a field, as in body.jsonl:field"),
        (["--seed", "-1"], 2, "seed is -1"),
        (["--unit", "4", "--multiple", "8"], 2, "--unit 4 contradicts --multiple 8"),
        (["--recipe", "none.yaml"], 2, "no recipe file none.yaml"),
    ],
)
def test_plan_refuses_what_prune_refuses(
    changes: list[str],
    code: int,
    expected: str,
    in_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    before = sorted(in_folder.rglob("*"))
    errors = []
    for name in ("plan", "prune"):
        assert run([name, *LINE, *changes]) == code
        caught = capsys.readouterr()
        errors.append(caught.err)
        assert expected in caught.err
        assert caught.err.count("\n") == 1
        assert caught.out == ""
    # prune has looked into the file, and lists its fields
    assert len({error.strip().partition("; found")[0] for error in errors}) == 1
    assert sorted(in_folder.rglob("*")) == before


def test_a_plan_needs_neither_text_nor_output_and_reads_no_text(
    in_folder: Path,
) -> None:
    arguments = ["plan", "llama", "--sparsity", "0.5", "--device", "cpu"]
    assert run(arguments) == 0
    (in_folder / "empty.txt").touch()  # refused by whoever reads it
    assert run([*arguments, "--calibration", "empty.txt"]) == 0


def test_a_plan_of_a_smaller_model_is_refused_in_one_line(
    in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    changes = ["--method", "fasp", "--sparsity", "0.3", "--multiple", "4"]
    assert run(["plan", "llama", *changes]) == 2
    error = capsys.readouterr().err
    assert "`plan` covers only runs that zero weights" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("typed", [["--unit", "2"], ["--unit", "2", "--multiple", "2"]])
def test_unit_is_the_former_name_of_multiple(typed: list[str], in_folder: Path) -> None:
    line = shlex.split(
        "prune llama --method fasp --sparsity 0.3 --format native --calibration text.txt "
        "--n-sequences 4 --sequence-length 12 --output out"
    )
    assert run([*line, *typed]) == 0
    assert yaml.safe_load(Path("out/recipe.yaml").read_text())["multiple"] == 2

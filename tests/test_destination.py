"""What ``--force`` replaces, and what it never does: nothing of others is ever lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import run
from layerwise.errors import UsageError
from layerwise.grams.collect_grams import collect_grams
from layerwise.grams.solve_grams import solve_grams
from layerwise.planning.plan import plan_run
from layerwise.recovery.retrain import retrain_model
from layerwise.run.prune import prune_model
from tests.support.folders import files_of
from tests.support.models import random_tokens, save_checkpoint, tiny_model, tiny_text

DATA: Any = {"calibration": random_tokens(4, 12), "n_sequences": 4, "sequence_length": 12}
OURS = "not a folder that layerwise wrote"
IN_USE = "is or holds"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and a stranger's thesis, from within which all runs."""
    save_checkpoint(tmp_path / "home" / "model", tiny_model("llama"))
    (tmp_path / "home" / "model" / "thesis.txt").write_text("mine")
    (tmp_path / "home" / "texts").mkdir()
    (tmp_path / "home" / "texts" / "text.txt").write_text(tiny_text())
    (tmp_path / "home" / "other").mkdir()
    (tmp_path / "home" / "other" / "precious.txt").write_text("keep")
    (tmp_path / "home" / "work").mkdir()
    monkeypatch.chdir(tmp_path / "home" / "work")
    return tmp_path / "home"


def prune(home: Path, output: Path | str, **options: Any) -> Any:
    arguments = {"method": "magnitude", "sparsity": 0.5, **DATA, **options}
    return prune_model(home / "model", output_dir=output, force=True, **arguments)


def as_link(home: Path) -> Path:
    (home / "link").symlink_to(home / "model")
    return home / "link"


def file_of(home: Path) -> Path:
    return home / "other" / "precious.txt"


def of_an_app(home: Path) -> Path:
    (home / "app").mkdir()
    (home / "app" / "manifest.json").write_text('{"name": "an app"}')
    return home / "app"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda home: home / "model", IN_USE),
        (lambda home: home / "work" / ".." / "model", IN_USE),
        (as_link, IN_USE),
        (lambda home: home, IN_USE),
        (lambda home: home / "work", IN_USE),
        (lambda home: home / "other", OURS),
        (file_of, OURS),
        (of_an_app, OURS),
    ],
    ids=["source", "source by ..", "link", "parent", "cwd", "foreign", "file", "app"],
)
def test_force_never_removes_what_is_not_ours(
    home: Path, output: Callable[[Path], Path], message: str
) -> None:
    place = output(home)
    before = files_of(home)
    with pytest.raises(UsageError, match=message):
        prune(home, place)
    plan = plan_run(home / "model", "magnitude", 0.5, output_dir=place, force=True, **DATA)
    with pytest.raises(UsageError, match=message):
        plan.check()
    assert files_of(home) == before


def test_the_folder_of_the_text_is_in_use(home: Path) -> None:
    (home / "texts" / "layerwise").mkdir()  # even if it looks like ours
    (home / "texts" / "layerwise" / "layers.jsonl").write_text("")
    before = files_of(home)
    with pytest.raises(UsageError, match=r"text\.txt, which is in use"):
        prune(home, home / "texts", calibration=str(home / "texts" / "text.txt"))
    assert files_of(home) == before


def test_force_replaces_what_layerwise_wrote(home: Path) -> None:
    out = home / "out"
    prune(home, out)
    (home / "empty").mkdir()
    prune(home, home / "empty")
    first = files_of(out)
    prune(home, out, sparsity=0.25)
    assert files_of(out) != first
    assert files_of(home / "empty") != files_of(out)


def test_other_commands_keep_their_inputs(home: Path) -> None:
    pruned, grams = home / "pruned", home / "grams"
    prune(home, pruned)
    collect_grams(home / "model", grams, **DATA)
    before = files_of(home)
    with pytest.raises(UsageError, match=IN_USE):
        collect_grams(home / "model", home / "model", force=True, **DATA)
    with pytest.raises(UsageError, match=IN_USE):
        solve_grams(grams, "magnitude", 0.5, output_dir=grams, force=True)
    with pytest.raises(UsageError, match=IN_USE):
        retrain_model(pruned, output_dir=pruned, force=True, **DATA)
    assert files_of(home) == before
    collect_grams(home / "model", grams, force=True, **DATA)
    solve_grams(grams, "magnitude", 0.5, output_dir=pruned, force=True)


def test_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, without --force too."""
    line = ["prune", str(home / "model"), "--method", "magnitude", "--sparsity", "0.5"]
    line += ["--calibration", str(home / "texts" / "text.txt"), "--output"]
    for arguments in ([str(home / "model")], [str(home), "--force"]):
        assert run([*line, *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert IN_USE in error
    assert (home / "model" / "thesis.txt").read_text() == "mine"


def test_a_text_in_place_of_a_file_name_is_refused_in_words(home: Path) -> None:
    with pytest.raises(UsageError, match="unknown text source"):
        prune(home, home / "out", calibration="word " * 2000)
    assert not (home / "out").exists()

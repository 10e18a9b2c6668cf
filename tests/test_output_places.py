"""Places for an output: used, or refused before the run and by a plan."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import run
from layerwise.errors import DataError, LayerwiseError, UsageError
from layerwise.grams.collect_grams import collect_grams
from layerwise.grams.solve_grams import solve_grams
from layerwise.planning.plan import plan_run
from layerwise.recovery.retrain import retrain_model
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline import destination
from layerwise.run.prune import prune_model
from tests.support.folders import files_of
from tests.support.models import random_tokens, save_checkpoint, tiny_model, tiny_text

DATA: Any = {"calibration": random_tokens(4, 12), "n_sequences": 4, "sequence_length": 12}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("places") / "model", tiny_model("llama"))


def prune(source: Path, out: Path | str, **options: Any) -> Any:
    return prune_model(source, "magnitude", 0.5, output_dir=out, **DATA, **options)


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder, with the targets of links."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else ""
        for path in folder.rglob("*")
    }


# --- places that are used ----------------------------------------------------------------


def link_to_nothing(folder: Path) -> str:
    (folder / "out").symlink_to(folder / "new")
    return "new"


def link_to_empty(folder: Path) -> str:
    (folder / "scratch").mkdir()
    (folder / "out").symlink_to("scratch")
    return "scratch"


def link_to_a_link(folder: Path) -> str:
    (folder / "disk").mkdir()
    (folder / "second").symlink_to("disk/new")
    (folder / "out").symlink_to(folder / "second")
    return "disk/new"


def empty(folder: Path) -> str:
    (folder / "out").mkdir()
    return "out"


def linked_parent(folder: Path) -> str:
    (folder / "disk").mkdir()
    (folder / "parent").symlink_to("disk")
    return "disk/out"


USED: dict[str, tuple[Callable[[Path], str], str]] = {
    "dangling link": (link_to_nothing, "out"),
    "link to an empty folder": (link_to_empty, "out"),
    "link to a link": (link_to_a_link, "out"),
    "empty folder": (empty, "out"),
    "link as parent": (linked_parent, "parent/out"),
    "missing parents": (lambda folder: "a/b/out", "a/b/out"),
    "points": (lambda folder: "out", "./a/../out/."),
    "spaces": (lambda folder: " out", " out"),
    "letters": (lambda folder: "aüß模", "aüß模"),
    "longest name": (lambda folder: "x" * 245, "x" * 245),
}


@pytest.mark.parametrize(("make", "name"), USED.values(), ids=list(USED))
def test_place_is_used(
    source: Path, tmp_path: Path, make: Callable[[Path], str], name: str
) -> None:
    target = make(tmp_path)
    if name.startswith("./a"):
        (tmp_path / "a").mkdir()
    links = {path: to for path, to in tree(tmp_path).items() if to}
    prune(source, f"{tmp_path}/{name}", force=name == "out")
    assert (tmp_path / target / "config.json").is_file()
    assert links == {path: to for path, to in tree(tmp_path).items() if to}
    assert not [path for path in tree(tmp_path) if ".replaced" in path or ".lock" in path]
    assert not [path for path in tree(tmp_path) if path.endswith(".partial")]


def test_a_link_is_replaced_at_its_end(source: Path, tmp_path: Path) -> None:
    target = link_to_empty(tmp_path)
    prune(source, tmp_path / "out")
    before = files_of(tmp_path / target)
    with pytest.raises(UsageError, match="scratch exists; choose another output"):
        prune(source, tmp_path / "out")
    assert files_of(tmp_path / target) == before
    prune(source, tmp_path / "out", force=True, seed=1)
    assert files_of(tmp_path / target) != before
    assert all(check.holds for check in verify(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", target]


def test_home(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    prune(source, "~/out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_parents_of_a_refused_run_are_removed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(LayerwiseError, match="matches nothing"):
        prune(source, tmp_path / "a" / "b" / "out", targets="re:nothing")
    assert list(tmp_path.iterdir()) == []


# --- places that are refused -------------------------------------------------------------


def file_as_parent(folder: Path) -> None:
    (folder / "file").write_text("mine")


def link_to_itself(folder: Path) -> None:
    (folder / "out").symlink_to("out")


def link_to_a_file(folder: Path) -> None:
    file_as_parent(folder)
    (folder / "out").symlink_to("file")


def link_to_others(folder: Path) -> None:
    (folder / "others").mkdir()
    (folder / "others" / "thesis.txt").write_text("mine")
    (folder / "out").symlink_to("others")


def dangling_parent(folder: Path) -> None:
    (folder / "parent").symlink_to("nowhere")


def linked_partial(folder: Path) -> None:
    (folder / "disk").mkdir()
    (folder / "out.partial").symlink_to("disk")


def nothing(folder: Path) -> None: ...


REFUSED: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "file": (lambda f: (f / "out").write_text("mine"), "out", "exists|layerwise wrote"),
    "pipe": (lambda f: os.mkfifo(f / "out"), "out", "exists|layerwise wrote"),
    "link to itself": (link_to_itself, "out", "cannot be used|cannot create"),
    "link to a file": (link_to_a_file, "out", "exists|layerwise wrote"),
    "link to a folder of others": (link_to_others, "out", "exists|layerwise wrote"),
    "file as parent": (file_as_parent, "file/out", "is not writable"),
    "file above": (file_as_parent, "file/a/out", "is not writable"),
    "dangling parent": (dangling_parent, "parent/out", "is not writable"),
    "link as partial": (linked_partial, "out", "is not an unfinished run"),
    "file as partial": (
        lambda f: (f / "out.partial").write_text("mine"),
        "out",
        "is not an unfinished run",
    ),
    "file as replaced": (
        lambda f: (f / ".out.replaced").write_text("mine"),
        "out",
        "is not an unfinished run",
    ),
    "name of a partial": (nothing, "out.partial", "has the name of an unfinished run"),
    "long name": (nothing, "x" * 246, "longer than 245 bytes"),
    "long name in UTF-8": (nothing, "模" * 82, "longer than 245 bytes"),
    "long parent": (nothing, "x" * 300 + "/out", "too long"),
    "NUL": (nothing, "o\0ut", "a NUL in it"),
    "NUL above": (nothing, "a\0b/out", "a NUL in it"),
    "not UTF-8": (nothing, os.fsdecode(b"ou\xff"), "not a name in UTF-8"),
    "parent not UTF-8": (nothing, os.fsdecode(b"a\xff/out"), "not a name in UTF-8"),
    "unknown home": (nothing, "~no-such-user/out", "cannot be used|Could not determine"),
}


@pytest.mark.parametrize(("make", "name", "message"), REFUSED.values(), ids=list(REFUSED))
def test_place_is_refused(
    source: Path, tmp_path: Path, make: Callable[[Path], Any], name: str, message: str
) -> None:
    make(tmp_path)
    before, force = tree(tmp_path), len(name) % 2 == 0
    place = name if name.startswith("~") else f"{tmp_path}/{name}"
    options: Any = {"output_dir": place, "force": force, **DATA}
    commands: list[Callable[[], Any]] = [
        lambda: prune_model("nowhere", "magnitude", 0.5, **options),
        lambda: collect_grams("nowhere", place, force=force, **DATA),
        lambda: solve_grams("nowhere", "wanda", 0.5, output_dir=place, force=force),
        lambda: retrain_model("nowhere", **options),
        lambda: plan_run(source, "magnitude", 0.5, **options).check(),
    ]
    for command in commands:
        with pytest.raises((UsageError, DataError), match=message) as caught:
            command()
        assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_mount_point_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount of a folder of the same file system only stands in the table of mounts."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "mounts").write_text(
        "22 1 0:21 / /proc rw - proc proc rw\n"
        f"30 22 8:1 /x {tmp_path}/a\\040b rw - ext4 /dev/sda1 rw\n"
    )
    monkeypatch.setattr(destination, "MOUNTS", tmp_path / "mounts")
    with pytest.raises(UsageError, match="is a mount point"):
        prune(source, tmp_path / "a b", force=True)
    with pytest.raises(UsageError, match="is a mount point"):
        prune(source, "/proc", force=True)
    (tmp_path / "link").symlink_to("a b")
    with pytest.raises(UsageError, match="is a mount point"):
        prune(source, tmp_path / "link")
    assert list((tmp_path / "a b").iterdir()) == []


def test_read_only_parent(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for place in ("out", "a/b/out"):
        with pytest.raises(DataError, match="is not writable"):
            prune(source, tmp_path / place)
    assert list(tmp_path.iterdir()) == []


def test_no_input_lies_in_what_a_run_removes(source: Path, tmp_path: Path) -> None:
    """A model in the partial folder of the output would be gone with --no-resume."""
    model = save_checkpoint(tmp_path / "out.partial" / "model", tiny_model("llama"))
    with pytest.raises(UsageError, match=r"is or holds .*, which is in use"):
        prune(model, tmp_path / "out", resume=False)
    assert (model / "config.json").is_file()


def test_command_does_not_force_away_its_text(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text())
    line = ["prune", str(source), "--method", "magnitude", "--sparsity", "0.5", "--force"]
    assert run([*line, "--calibration", str(text), "--output", str(text)]) == 2
    assert "in use" in capsys.readouterr().err
    assert text.read_text() == tiny_text()
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]

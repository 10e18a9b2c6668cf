"""Folders of smaller models: who opens them, what verify finds, resume, and next runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import layerwise
from layerwise.cli import run
from layerwise.errors import DataError
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline.journal import read_layers
from layerwise.run.prune import prune_model
from tests.support.models import SHARD, save_checkpoint, tiny_model, tiny_text
from tests.support.shrinking import FAMILIES, RUNS, logits

TEXT = [tiny_text()]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        save_checkpoint(folder / family, tiny_model(family, dtype=torch.bfloat16))
    return folder


def by_path(source: Path, output: Path, **options: Any) -> Any:
    given = {
        "method": "fasp",
        "sparsity": 0.3,
        "multiple": 1,
        "calibration": TEXT,
        "n_sequences": 6,
        "sequence_length": 12,
        **options,
    }
    return prune_model(source, output_dir=output, **given)


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one / SHARD), load_file(other / SHARD)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def problems(folder: Path) -> list[str]:
    return [problem for check in verify(folder) for problem in check.problems]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [name for name in RUNS if name != "wanda"])
def test_folder_opens_as_the_model_that_was_returned(
    sources: Path, tmp_path: Path, family: str, kind: str
) -> None:
    out = tmp_path / "out"
    report = by_path(sources / family, out, **RUNS[kind])
    assert problems(out) == []
    native = RUNS[kind].get("format") == "native"
    if native:
        with pytest.raises((ValueError, KeyError)):
            AutoModelForCausalLM.from_pretrained(out)
        opened: Any = layerwise.load(out)
    else:
        loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        opened, info = loaded
        assert not any(info.values())
    assert torch.equal(logits(opened.eval()), logits(report.model))
    assert opened.dtype == torch.bfloat16
    assert (out / "tokenizer.json").is_file()
    if kind != "flap padded":  # zeros fill what has left
        smaller = (out / SHARD).stat().st_size
        assert smaller < (sources / family / SHARD).stat().st_size


def test_folder_tells_what_was_done(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = by_path(sources / "llama", out, method="columns", format="native")
    recipe = Recipe.read(out / "recipe.yaml")
    assert (recipe.pattern, recipe.format, recipe.multiple) == ("columns", "native", 1)
    assert recipe.allocation == "optimal"
    assert [r.name for r in read_layers(out)] == [r.name for r in report.records]
    kept = json.loads((out / "layerwise" / "channels.json").read_text())
    assert set(kept) <= {"model.layers.0", "model.layers.1"}
    smaller = json.loads((out / "layerwise" / "manifest.json").read_text())["smaller"]
    assert smaller["parameters_after"] < smaller["parameters_before"]
    assert smaller["price"] > 0
    assert smaller["predicted_loss"] > 0
    card = (out / "README.md").read_text()
    assert "layerwise.load(folder)" in card
    assert f"{1 - report.parameters_left:.4f} of the parameters" in card


def test_recipe_repeats_the_run(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(tiny_text())
    arguments = ["prune", str(sources / "llama"), "--method", "flap", "--sparsity", "0.3"]
    arguments += ["--multiple", "1", "--calibration", str(tmp_path / "text.txt")]
    arguments += ["--n-sequences", "6", "--sequence-length", "12"]
    out, again = tmp_path / "out", tmp_path / "again"
    assert run([*arguments, "--output", str(out)]) == 0
    recipe = ["--recipe", str(out / "recipe.yaml")]
    assert run(["prune", *recipe, "--output", str(again)]) == 0
    assert same_tensors(out, again)
    assert run(["verify", str(again)]) == 0
    assert (out / "layerwise" / "report.html").is_file()


class Killed(BaseException):
    """Stands for the end of the process."""


class KillAt:
    """Callback that ends the run after a layer."""

    def __init__(self, name: str) -> None:
        self._name = name

    def on_start(self, n_layers: int) -> None: ...

    def on_layer(self, record: Any) -> None:
        if record.name == self._name:
            raise Killed

    def on_finish(self, report: Any) -> None: ...


class KillInSurvey(KillAt):
    """Callback that ends the run before its survey comes to a block."""

    def on_layer(self, record: Any) -> None: ...

    def on_note(self, text: str) -> None:
        if text.startswith(f"survey of block {self._name} "):
            raise Killed


class Notes(KillAt):
    """Callback that collects the remarks and never ends the run."""

    def __init__(self) -> None:
        super().__init__("")
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)


def test_killed_survey_continues_and_ends_with_the_same_bytes(
    sources: Path, tmp_path: Path
) -> None:
    options = {**RUNS["columns native"], "allocation": "optimal"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    by_path(sources / "llama", whole, **options)
    with pytest.raises(Killed):
        by_path(sources / "llama", out, callbacks=[KillInSurvey("2")], **options)
    notes = Notes()
    by_path(sources / "llama", out, callbacks=[notes], **options)
    surveyed = [text for text in notes.texts if "survey" in text]
    assert surveyed[0] == "continuing the survey: 1 of 2 blocks are there"
    assert [text.split(",")[0] for text in surveyed[1:]] == ["survey of block 2 of 2"]
    assert same_tensors(whole, out)
    assert not list(out.rglob("survey*"))


@pytest.mark.parametrize("kind", ["columns native", "flap", "fasp"])
def test_killed_run_resumes_and_ends_with_the_same_bytes(
    sources: Path, tmp_path: Path, kind: str
) -> None:
    options = RUNS[kind]
    whole, out = tmp_path / "whole", tmp_path / "out"
    by_path(sources / "llama", whole, **options)
    last = read_layers(whole)[-1].name
    with pytest.raises(Killed):
        by_path(sources / "llama", out, callbacks=[KillAt(last)], **options)
    assert not out.exists()
    by_path(sources / "llama", out, **options)
    assert same_tensors(whole, out)
    assert problems(out) == []


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def _drop_bias(folder: Path) -> None:
    _edit(folder / "config.json", lambda config: config.update(mlp_bias=False))


def _stock_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["original"]))


def _other_width(folder: Path) -> None:
    _edit(folder / "config.json", lambda config: config.update(intermediate_size=20))


def _tensors(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


DOWN = "model.layers.0.mlp.down_proj.weight"
DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a bias that stock drops": ("flap", _drop_bias, "set mlp_bias to true"),
    "another width": ("flap", _other_width, "config.json asks for"),
    "not finite": (
        "flap",
        lambda f: _tensors(f, lambda t: t[DOWN].fill_(float("nan"))),
        "not finite",
    ),
    "another tensor changed": (
        "flap",
        lambda f: _tensors(f, lambda t: t["model.norm.weight"].add_(1)),
        "model.norm.weight: other bytes",
    ),
    "native that stock opens": (
        "columns native",
        _stock_config,
        "stock transformers opens it as something else",
    ),
    "another record of what stayed": (
        "columns native",
        lambda f: _edit(
            f / "layerwise" / "channels.json",
            lambda kept: next(iter(kept.values()))["mlp"].pop(),
        ),
        "on record",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_damage(
    sources: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, change, message = DAMAGES[damage]
    out = tmp_path / "out"
    by_path(sources / "llama", out, **RUNS[kind])
    assert run(["verify", str(out)]) == 0
    change(out)
    assert run(["verify", str(out)]) == 3
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("second", ["2:4", "smaller"])
def test_a_smaller_model_can_be_pruned_again(
    sources: Path, tmp_path: Path, second: str
) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    by_path(sources / "llama", first, method="columns", multiple=4)
    if second == "2:4":
        by_path(first, out, method="sparsegpt", sparsity="2:4", multiple=None)
    else:
        by_path(first, out, method="fasp", sparsity=0.2)
    assert problems(out) == []
    before, after = (load_file(folder / SHARD)[DOWN] for folder in (first, out))
    if second == "2:4":
        groups = (after.reshape(-1, 4) != 0).sum(dim=1)
        assert after.shape == before.shape
        assert int(groups.max()) == 2
    else:
        assert after.shape[1] < before.shape[1]
    AutoModelForCausalLM.from_pretrained(out)


def test_source_is_left_as_it_was(sources: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sources / "opt", tmp_path / "copy")
    by_path(copy, tmp_path / "out", method="columns")
    for path in sorted(copy.rglob("*")):
        assert path.read_bytes() == (sources / "opt" / path.relative_to(copy)).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "fasp", "--sparsity", "2:4"], "takes a fraction"),
        (["--method", "fasp", "--sparsity", "0.3", "--format", "gguf"], "stock"),
        (["--method", "fasp", "--sparsity", "0.99"], "can be pruned"),
        (["--method", "wanda", "--sparsity", "0.3", "--multiple", "4"], "smaller models"),
        (["--method", "fasp", "--sparsity", "0.3", "--pattern", "rows"], "pattern"),
        (["--method", "flap", "--sparsity", "0.3", "--allocation", "al-am"], "native"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    sources: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "text.txt").write_text(tiny_text())
    fixed = ["prune", str(sources / "llama"), "--calibration", str(tmp_path / "text.txt")]
    fixed += ["--n-sequences", "6", "--sequence-length", "12"]
    code = run([*fixed, *arguments, "--output", str(tmp_path / "out")])
    captured = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(captured) == 1
    assert message in captured[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["text.txt"]


def test_a_block_that_is_lost_before_the_cut_is_an_error(
    sources: Path, tmp_path: Path
) -> None:
    """Its channels would stay, and nothing would tell."""

    class LosesFirstBlock:
        def on_start(self, n_layers: int) -> None: ...

        def on_layer(self, record: Any) -> None:
            for path in tmp_path.glob("out.partial/layerwise/blocks/00000-*"):
                path.unlink()

        def on_finish(self, report: Any) -> None: ...

    with pytest.raises(DataError, match="lost block 0"):
        by_path(
            sources / "llama",
            tmp_path / "out",
            method="columns",
            callbacks=[LosesFirstBlock()],
        )
    assert not (tmp_path / "out").exists()

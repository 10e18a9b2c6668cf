"""Solving stored layers: the bytes of a prune, any number of times, and no surprises."""

import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.cli import run
from layerwise.errors import DataError, InvalidProblemError, UsageError
from layerwise.grams import layer_jobs
from layerwise.grams import solve_grams as module
from layerwise.grams.collect_grams import collect_grams
from layerwise.grams.layer_jobs import LayerJob, forget_files, solve_layer
from layerwise.grams.solve_grams import solve_grams
from layerwise.patterns import Unstructured
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline import matrix
from layerwise.run.pipeline.journal import read_layers, read_masks
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.run.prune import prune_model
from layerwise.solvers import get_solver
from tests.support.gram_folders import FIRST, LAYERS, MODELS, TOKENS, collected, edit_file
from tests.support.models import save_checkpoint, shard_hashes, tiny_model


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints by family, and their grams."""
    folder = tmp_path_factory.mktemp("solve")
    for family in MODELS:
        collected(folder, family)
    return folder


@pytest.fixture(scope="module")
def few(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grams of two layers of OPT."""
    folder = tmp_path_factory.mktemp("few") / "grams"
    collect_grams(workshop / "opt", folder, targets="re:.*q_proj", **TOKENS)
    return folder


@pytest.fixture
def grams(workshop: Path) -> Path:
    return workshop / "llama-grams"


def without_time(records: Iterable[LayerRecord]) -> list[LayerRecord]:
    return [replace(record, seconds=0.0) for record in records]


# --- the same as a prune ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "sparsity", "more"),
    [
        ("llama", "sparsegpt", "2:4", {}),
        ("llama", "wanda+least-squares", 0.5, {"group": "layer", "damping": 0.1}),
        ("gpt2", "dsnot", 0.5, {}),
        ("opt", "fista-paper", "4:8", {"options": {"max_rounds": 2}}),
        ("llama", "alps", 0.6, {"options": {"iterations": 20}}),
    ],
)
def test_bytes_of_a_prune(
    family: str,
    method: str,
    sparsity: Any,
    more: dict[str, Any],
    workshop: Path,
    tmp_path: Path,
) -> None:
    folder, source = tmp_path / "solved", workshop / family
    sweep = solve_grams(
        workshop / f"{family}-grams",
        method,
        sparsity,
        output_dir=folder,
        model=source,
        **more,
    )
    of_prune = dict(more)
    if of_prune.pop("group", "row") == "layer":
        of_prune["pattern"] = Unstructured(sparsity, "layer")
    report = prune_model(
        source,
        method,
        None if "pattern" in of_prune else sparsity,
        error_correction="none",
        output_dir=tmp_path / "pruned",
        **TOKENS,
        **of_prune,
    )
    assert shard_hashes(folder) == shard_hashes(tmp_path / "pruned")
    for name in ("recipe.yaml", "layerwise/manifest.json", "config.json"):
        other = tmp_path / "pruned" / name
        assert (folder / name).read_text() == other.read_text(), name
    assert without_time(sweep.records) == without_time(report.records)
    assert without_time(read_layers(folder)) == without_time(report.records)
    assert all(check.holds for check in verify(folder))
    assert not (folder / "layerwise" / "blocks").exists()


def test_proven_gaps_of_a_prune(workshop: Path, few: Path) -> None:
    sweep = solve_grams(few, "wanda", 0.5, certify=True)
    report = prune_model(
        workshop / "opt",
        "wanda",
        0.5,
        error_correction="none",
        certify=True,
        targets="re:.*q_proj",
        **TOKENS,
    )
    assert all(record.proven_gap for record in sweep.records)
    assert without_time(sweep.records) == without_time(report.records)


def test_weights_without_a_model(grams: Path, tmp_path: Path) -> None:
    solve_grams(grams, "wanda", 0.5, output_dir=tmp_path / "out")
    masks = read_masks(tmp_path / "out")
    weights: dict[str, torch.Tensor] = {}
    for path in sorted((tmp_path / "out").glob("*.safetensors")):
        dense, found = load_file(grams / path.name), load_file(path)
        weights |= found
        for name, weight in found.items():
            assert weight.dtype == dense[name].dtype
            assert torch.equal(weight, dense[name] * masks[name])
    assert set(weights) == set(masks)
    assert len(weights) == len(read_layers(tmp_path / "out")) == LAYERS
    assert int(masks["model.layers.0.mlp.up_proj.weight"].sum()) == 24 * 8


# --- sweeps ----------------------------------------------------------------------------


def test_sweep_is_the_single_solves(grams: Path) -> None:
    seen: list[str] = []
    sweep = solve_grams(
        grams,
        ["wanda", "sparsegpt", get_solver("magnitude")],
        [0.5, "2:4"],
        on_layer=lambda record: seen.append(record.name),
    )
    assert len(seen) == 6 * LAYERS
    assert seen[:3] == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    rows = sweep.rows()
    assert [(row.method, row.pattern) for row in rows] == [
        (method, pattern)
        for method in ("wanda", "sparsegpt", "magnitude")
        for pattern in ("0.5", "2:4")
    ]
    for number, row in enumerate(rows):
        (alone,) = solve_grams(grams, row.method, row.pattern).rows()
        assert replace(alone, seconds=0.0) == replace(row, seconds=0.0)
        part = sweep.records[number * LAYERS : (number + 1) * LAYERS]
        errors = sorted(record.relative_error for record in part)
        assert row.mean_relative_error == pytest.approx(sum(errors) / LAYERS)
        assert row.median_relative_error == pytest.approx(sum(errors[6:8]) / 2)
        assert row.sparsity == 0.5


def test_options_reach_the_methods_that_have_them(grams: Path) -> None:
    methods = ["sparsegpt", "wanda"]
    plain, changed = (
        solve_grams(grams, methods, 0.5, options=options).rows()
        for options in ({}, {"block_size": 4})
    )
    assert plain[0].mean_relative_error != changed[0].mean_relative_error
    assert plain[1].mean_relative_error == changed[1].mean_relative_error
    (single,) = solve_grams(grams, "sparsegpt", 0.5, options={"block_size": 4}).rows()
    assert single.mean_relative_error == changed[0].mean_relative_error


def test_a_job_is_pure(grams: Path, tmp_path: Path) -> None:
    job = LayerJob(
        file=grams / FIRST,
        name="model.layers.0.self_attn.k_proj",
        zeros=ZeroWeights(Method(get_solver("sparsegpt")), Unstructured(0.5)),
        folder=tmp_path,
        index=7,
    )
    one = replace(solve_layer(job).record, seconds=0.0)
    (path,) = tmp_path.glob("00007-*.safetensors")
    content = load_file(path)
    forget_files()
    path.unlink()
    again = solve_layer(pickle.loads(pickle.dumps(job))).record
    assert replace(again, seconds=0.0) == one
    (path,) = tmp_path.glob("00007-*.safetensors")
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, content[name])


def test_methods_and_patterns_do_not_share_what_they_computed(
    grams: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of one stage do, so a sweep takes the time of its prunes."""
    found: list[tuple[str, int]] = []

    def spy(method: Any, name: str, pose: Callable[[], Any]) -> Any:
        problem = pose()
        found.append((str(problem.pattern), id(problem.moments)))
        kept.append(problem.moments)
        return original(method, name, lambda: problem)

    kept: list[Any] = []  # so that no address is used twice
    original = matrix.solve_matrix
    monkeypatch.setattr(layer_jobs, "solve_matrix", spy)
    solve_grams(grams, "wanda", [0.5, 0.25])
    assert len(set(found)) == 2 * 8
    assert len({address for _, address in found}) == 2 * 8


@pytest.mark.slow
def test_workers_give_the_same(
    workshop: Path, grams: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["solve", str(grams), "--method", "sparsegpt", "--sparsity", "2:4"]
    arguments += ["--model", str(workshop / "llama"), "--threads", "1"]
    assert run([*arguments, "--output", str(tmp_path / "one")]) == 0
    assert run([*arguments, "--output", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert shard_hashes(tmp_path / "one") == shard_hashes(tmp_path / "two")
    one, two = (read_layers(tmp_path / name) for name in ("one", "two"))
    assert without_time(one) == without_time(two)
    assert run([*arguments, "--output", str(tmp_path / "no"), "--workers", "0"]) == 2
    assert "workers must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_errors_of_workers_are_ours(grams: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grams"
    folder.mkdir()
    for path in grams.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    edit_file(folder, "00001-03.safetensors", gram=torch.full((24, 24), torch.nan))
    with pytest.raises(DataError, match=r"00001-03.safetensors: gram contains nan"):
        solve_grams(folder, "wanda", 0.5, workers=2, threads=1, output_dir=tmp_path / "out")
    done = tmp_path / "out.partial" / "layerwise" / "blocks"
    assert len(list(done.iterdir())) == LAYERS - 1


# --- interrupted -----------------------------------------------------------------------


@pytest.mark.parametrize("with_model", [False, True])
def test_an_interrupted_solve_continues(
    with_model: bool,
    workshop: Path,
    grams: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = workshop / "llama" if with_model else None
    solve_grams(grams, "sparsegpt", 0.5, output_dir=tmp_path / "whole", model=model)
    calls = 0

    def counted(job: LayerJob) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return solve_layer(job)

    monkeypatch.setattr(module, "solve_layer", counted)
    arguments: dict[str, Any] = {"output_dir": tmp_path / "out", "model": model}
    with pytest.raises(KeyboardInterrupt):
        solve_grams(grams, "sparsegpt", 0.5, **arguments)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="unfinished run with another sparsity"):
        solve_grams(grams, "sparsegpt", 0.6, **arguments)
    sweep = solve_grams(grams, "sparsegpt", 0.5, **arguments)
    assert calls == LAYERS + 1
    assert len(sweep.records) == LAYERS
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")


def test_a_solve_that_fails_at_once_leaves_nothing(
    grams: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: LayerJob) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "solve_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        solve_grams(grams, "wanda", 0.5, output_dir=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- hostile folders -------------------------------------------------------------------


def test_another_model(workshop: Path, grams: Path, tmp_path: Path) -> None:
    other = tiny_model("llama", dtype=torch.bfloat16, seed=1)
    save_checkpoint(tmp_path / "other", other, tokenizer=False)
    with pytest.raises(DataError, match=r"not the model that was .* model.safetensors"):
        solve_grams(
            grams, "wanda", 0.5, output_dir=tmp_path / "out", model=tmp_path / "other"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


# --- what is refused before any work ---------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"methods": "wnada"}, UsageError, "did you mean wanda"),
        ({"methods": []}, UsageError, "give a method"),
        ({"methods": ["wanda", "wanda"]}, UsageError, "wanda at 0.5 is requested twice"),
        ({"methods": "least-squares"}, InvalidProblemError, "for a fixed mask"),
        ({"methods": "gblm"}, UsageError, "gblm needs the gradient .* layerwise prune"),
        ({"sparsities": 1.5}, InvalidProblemError, "must lie in"),
        ({"sparsities": "2:5"}, InvalidProblemError, "q_proj: pattern 2:5 needs a width"),
        ({"sparsities": "2:4", "group": "layer"}, UsageError, "cannot be combined"),
        ({"group": "block"}, InvalidProblemError, "group must be"),
        ({"options": {"block_size": 4}}, UsageError, "wanda has no option"),
        (
            {"methods": ["wanda", "magnitude"], "options": {"x": 1}},
            UsageError,
            "none of wanda, magnitude has an option 'x'",
        ),
        ({"damping": -1.0}, InvalidProblemError, "damping must be"),
        ({"model": "llama"}, UsageError, "give an output"),
        ({"sparsities": [0.5, 0.6], "output_dir": "out"}, UsageError, "got 2"),
        ({"output_dir": ".."}, UsageError, "does not name a new folder"),
        ({"workers": 0}, UsageError, "workers must be at least 1"),
        ({"workers": 2, "threads": 0}, UsageError, "threads must be at least 1"),
        ({"device": "abacus"}, UsageError, "cannot be used"),
    ],
)
def test_refusals(
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
    grams: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "solve_layer", None)
    with pytest.raises(error, match=words):
        solve_grams(grams, **{"methods": "wanda", "sparsities": 0.5, **changes})


# --- the command -----------------------------------------------------------------------


def test_command(
    workshop: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["solve", str(few), "--method", "wanda", "--sparsity", "0.5"]
    more = ["--method", "sparsegpt", "--sparsity", "2:4", "--certify"]
    figures = tmp_path / "figures.json"
    assert run([*arguments, *more, "--json", str(figures)]) == 0
    printed = capsys.readouterr()
    found = json.loads(figures.read_text())
    assert len(found["records"]) == 4 * 2
    assert len(found["summary"]) == 4
    for row in found["summary"]:
        assert f"{row['mean_relative_error']:.4f}" in printed.out
        assert 0 < row["median_proven_gap"] < 1
    assert "proven within" in printed.out
    assert "[8/8]" in printed.err
    arguments += ["--model", str(workshop / "opt")]
    assert run([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert run(["verify", str(tmp_path / "out")]) == 0
    assert run(arguments) == 2
    assert "give an output" in capsys.readouterr().err

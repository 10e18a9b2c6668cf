"""Figures of layers in files: checked one by one, and read by one reader."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import run
from layerwise.errors import DataError, VerificationError
from layerwise.recovery.retrain import retrain_model
from layerwise.reports.report import run_page
from layerwise.run.pipeline.journal import read_layers
from layerwise.run.pipeline.records import LayerRecord, read_records, record_lines
from layerwise.run.prune import prune_model
from tests.support.models import random_tokens, save_checkpoint, tiny_model

DATA: Any = {"calibration": random_tokens(4, 12), "n_sequences": 4, "sequence_length": 12}
GOOD = LayerRecord(
    name="block.q",
    shape=(3, 5),
    method="wanda",
    pattern="0.5",
    sparsity=0.4,
    relative_error=0.125,
    status="feasible",
    certificate=1e-9,
    certificate_kind="refit",
    damping=0.01,
    damping_raised=False,
    rank=5,
    dead_channels=0,
    n_tokens=72,
    iterations=3,
    seconds=0.5,
    proven_gap=0.25,
)
IMPOSSIBLE: dict[str, list[Any]] = {
    "name": [None, 3, ["a"]],
    "shape": [[3], [3, 5, 1], "35", [3, -5], [0, 5], [3, 5.0], [True, 5], None],
    "method": [None, 1],
    "pattern": [0.5],
    "sparsity": [None, -0.1, 1.5, "0.5", True],
    "relative_error": [None, -1, "0.1", [], {}],
    "status": [None],
    "certificate": ["x", [1]],
    "certificate_kind": [1],
    "damping": [None, -1.0, 1e400],
    "damping_raised": [0, "no", None],
    "rank": [-1, 5.5, True, 10**400],
    "dead_channels": [None, "0"],
    "n_tokens": [1e3],
    "iterations": [None],
    "seconds": [None, -1, 1e400],
    "proven_gap": [2, -0.5, "0", 1e400],
    "extra": [1],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in IMPOSSIBLE for value in IMPOSSIBLE[name]]
)
def test_impossible_figure_is_named(name: str, value: Any) -> None:
    line = json.dumps(GOOD.to_dict() | {name: value})
    with pytest.raises(DataError, match=rf"line 2: the figure '{name}'") as caught:
        read_records((record_lines([GOOD]) + line).encode())
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("name", sorted(set(GOOD.to_dict()) - {"proven_gap"}))
def test_missing_figure_is_named(name: str) -> None:
    values = {key: value for key, value in GOOD.to_dict().items() if key != name}
    with pytest.raises(DataError, match=f"figure '{name}' is missing"):
        LayerRecord.from_dict(values)


def test_a_log_without_the_latest_figure_is_read() -> None:
    values = GOOD.to_dict()
    del values["proven_gap"]
    assert LayerRecord.from_dict(values).proven_gap is None


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"name": NaN}', "3", "null"])
def test_line_that_is_not_a_record_is_numbered(text: str) -> None:
    with pytest.raises(DataError, match=r"^line 2"):
        read_records((record_lines([GOOD]) + text + "\n").encode())


def test_what_is_written_is_read() -> None:
    odd = replace(GOOD, name="a\u2028b\udc80")
    bounds = [None, 0.0, -1e-18, float("inf")]
    records = [odd, *(replace(GOOD, certificate=bound) for bound in bounds)]
    assert read_records(record_lines(records).encode()) == records


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    save_checkpoint(folder / "model", tiny_model("llama"))
    prune_model(folder / "model", "magnitude", 0.5, output_dir=folder / "out", **DATA)
    return folder


def edited(path: Path, old: str, new: str) -> Callable[[], None]:
    """Change a file; return the function that restores it."""
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))

    def restore() -> None:
        path.write_text(text)

    return restore


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("layerwise/layers.jsonl", '"relative_error": 0.', '"relative_error": 0.0'),
        ("layerwise/layers.jsonl", '"method": "magnitude"', '"method": "best"'),
        ("recipe.yaml", "magnitude", "best"),
        ("recipe.yaml", "sparsity: 0.5", "sparsity: 0.6"),
    ],
)
def test_no_report_of_changed_figures(
    pruned: Path, name: str, old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    restore = edited(pruned / "out" / name, old, new)
    try:
        with pytest.raises(VerificationError, match="is not as the run wrote it"):
            run_page(pruned / "out")
        assert run(["report", str(pruned / "out")]) == 3
        assert capsys.readouterr().err.count("\n") == 1
        with pytest.raises(VerificationError, match="is not as the run wrote it"):
            retrain_model(pruned / "out", objective="tokens", **DATA)
    finally:
        restore()


@pytest.mark.parametrize("figure", ['"relative_error": null', '"proven_gap": Infinity'])
def test_a_report_of_an_older_version_names_the_damage(pruned: Path, figure: str) -> None:
    """Whose manifest has no hashes of the other files."""
    out = pruned / "out"
    manifest = json.loads((out / "layerwise" / "manifest.json").read_text())
    text = json.dumps(manifest | {"files": {}})
    key = figure.split(":")[0]
    value = json.dumps(read_layers(out)[0].to_dict()[key.strip('"')])
    undo = [
        edited(out / "layerwise" / "manifest.json", json.dumps(manifest, indent=1), text),
        edited(out / "layerwise" / "layers.jsonl", f"{key}: {value}", figure),
    ]
    try:
        with pytest.raises(DataError, match=rf"jsonl is damaged: line 1: .*{key[1:4]}"):
            run_page(out)
    finally:
        for restore in undo:
            restore()

"""Reports: complete, self-contained, harmless, and showing the numbers of the records."""

import ast
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from html import unescape
from pathlib import Path

import matplotlib
import pytest

from layerwise.errors import DataError, UsageError
from layerwise.experiments.results import MethodResult
from layerwise.reports import page as page_module
from layerwise.reports import plots, report
from layerwise.reports.report import comparison_page, run_page, write_report
from layerwise.run.outputs.output import MANIFEST, Manifest
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.destination import FOLDER, LAYERS
from layerwise.run.pipeline.records import LayerRecord
from tests.support.reports import HOSTILE, Document, layers, record


def result(method: str, perplexity: float, pattern: str = "0.5") -> MethodResult:
    records = layers(perplexity / 60 if math.isfinite(perplexity) else 1.5)
    mean = sum(one.relative_error for one in records) / len(records)
    return MethodResult("llama", method, pattern, perplexity, mean, 1.234, records)


def run_folder(folder: Path, records: Sequence[LayerRecord], **recipe: str) -> Path:
    (folder / FOLDER).mkdir(parents=True)
    lines = [json.dumps(one.to_dict()) + "\n" for one in records]
    (folder / FOLDER / LAYERS).write_text("".join(lines))
    values = {"model": "some/model", "method": "wanda", "sparsity": "2:4"} | recipe
    checked = Recipe.check(values, "test")
    manifest = Manifest(
        sparsity=str(checked.sparsity),
        group=checked.group,
        pruned={},
        untouched={},
        source={},
        calibration=checked.calibration or "wikitext2",
        calibration_sha256="0" * 64,
        versions={"layerwise": "0.1.0"},
    )
    (folder / FOLDER / MANIFEST).write_text(manifest.model_dump_json())
    (folder / report.RECIPE).write_text(checked.to_yaml())
    return folder


def small_comparison() -> str:
    return comparison_page([result("wanda", 66.0)], {"llama": 58.1}, "layerwise demo")


@cache
def comparison() -> str:
    results = [
        result(method, perplexity, pattern)
        for pattern in ("0.5", "2:4")
        for method, perplexity in (("wanda", 66.0), ("wanda+swaps+least-squares", 62.345))
    ]
    results += [replace(one, model="opt") for one in results]
    return comparison_page(results, {"llama": 58.1, "opt": 57.0}, "layerwise demo --all")


def run(tmp_path: Path) -> str:
    return run_page(run_folder(tmp_path / "run", layers()))


@pytest.fixture(params=["comparison", "run"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return comparison() if request.param == "comparison" else run(tmp_path)


def test_page_is_well_formed(page: str) -> None:
    document = Document(page)
    ids = document.attributes("id")
    assert len(ids) == len(set(ids))
    references = [link.removeprefix("#") for link in document.attributes("href")]
    references += re.findall(r"url\(#([^)]*)\)", page)
    assert references
    assert set(references) <= set(ids)
    assert "viewport" in document.attributes("name")


def test_page_makes_no_request(page: str) -> None:
    document = Document(page)
    assert all(link.startswith("#") for link in document.attributes("href"))
    assert not document.attributes("src")
    assert not re.findall(r"url\((?!#)|@import|https?://", page)
    assert {tag for tag, _ in document.tags}.isdisjoint({"link", "img", "iframe", "object"})
    assert document.attributes("content")[0].startswith("default-src 'none'")
    scripts = [found for tag, found in document.tags if tag == "script"]
    assert all(found["type"] == "application/json" for found in scripts)
    assert not [name for _, found in document.tags for name in found if name[:2] == "on"]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    name = f"model.layers.0.{HOSTILE}"
    hostile = replace(
        record(name, 0.1), status=HOSTILE, certificate=0.1, certificate_kind=HOSTILE
    )
    one = replace(result("wanda", 60.0), model=HOSTILE, method=HOSTILE, pattern=HOSTILE)
    one = replace(one, records=(hostile,))
    text = comparison_page([one], {HOSTILE: 58.0}, HOSTILE)
    folder = run_folder(
        tmp_path / "run",
        [replace(hostile, dead_channels=1, damping_raised=True)],
        model=HOSTILE,
        method=HOSTILE,
        calibration=HOSTILE,
    )
    for hostile_page, seen in ((text, 6), (run_page(folder), 8)):
        document = Document(hostile_page)
        tags = [tag for tag, _ in document.tags]
        assert "img" not in tags
        assert tags.count("script") == hostile_page.count("application/json")
        assert document.text.count(HOSTILE) >= seen
        assert not [x for _, found in document.tags for x in found if x[:2] == "on"]


def test_same_input_gives_same_bytes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", layers())
    first = small_comparison(), run_page(folder)
    with matplotlib.rc_context({"font.size": 3.0, "axes.linewidth": 9.0}):
        assert (small_comparison(), run_page(folder)) == first
        assert matplotlib.rcParams["font.size"] == 3.0  # the reader's settings survive


def test_comparison_shows_the_results() -> None:
    document = Document(comparison())
    mean = sum(one.relative_error for one in layers(66.0 / 60)) / len(layers())
    assert "Dense perplexity 58.10" in document.text
    assert ["wanda", "66.00", "+13.60", f"{mean:.4f}", "1.23"] in document.rows
    assert document.rows[1] == ["50 % zeros"]
    assert document.rows[4] == ["2:4 (2 of every 4 weights kept)"]
    assert "layerwise demo --all" in document.text
    assert document.marked[:5] == ["1.23", "62.34", "+7.31", "0.1351", "1.23"]


def test_infinite_perplexity_is_shown_and_never_best() -> None:
    results = [result(name, math.inf) for name in ("magnitude", "wanda")]
    document = Document(comparison_page(results, {"llama": 58.0}, "layerwise demo"))
    assert document.rows[2][1:3] == ["inf", "+inf"]
    assert "inf" not in document.marked
    results.insert(0, replace(results[0], method="fista", perplexity=math.nan))
    results.append(result("sparsegpt", 70.0))
    document = Document(comparison_page(results, {"llama": 58.0}, "layerwise demo"))
    assert document.marked[-4:-2] == ["70.00", "+20.69"]
    assert {"inf", "nan"}.isdisjoint(document.marked)


def test_a_single_method_is_not_called_the_best() -> None:
    assert Document(small_comparison()).marked == []


def test_run_page_shows_every_layer(tmp_path: Path) -> None:
    records = list(layers())
    records[4] = replace(
        records[4],
        damping=0.1,
        damping_raised=True,
        rank=60,
        dead_channels=3,
        status="max_iterations",
        certificate=2.5e-9,
        certificate_kind="refit",
    )
    document = Document(run_page(run_folder(tmp_path / "run", records)))
    assert document.rows[1] == [
        *("model.layers.0.self_attn.q_proj", "64 \N{MULTIPLICATION SIGN} 64", "0.5000"),
        *("0.0500", "feasible", "\N{EN DASH}", "0.01", "64 / 64", "0", "0.013"),
    ]
    assert document.rows[5] == [
        *("model.layers.1.mlp.up_proj", "176 \N{MULTIPLICATION SIGN} 64", "0.5000"),
        *("0.1300", "max iterations", "refit 2.5e-09", "0.1", "60 / 64", "3", "0.013"),
    ]
    assert [row[0] for row in document.rows[1:]] == [one.name for one in records]


def test_run_page_sums_up(tmp_path: Path) -> None:
    records = list(layers())
    records[2] = replace(records[2], relative_error=0.9, damping_raised=True, sparsity=1.0)
    records[3] = replace(records[3], rank=1, status="optimal")
    weights = [math.prod(one.shape) for one in records]
    zeros = (sum(weights) + weights[2]) / 2 / sum(weights)
    mean = sum(one.relative_error for one in records) / len(records)
    text = Document(run_page(run_folder(tmp_path / "run", records))).text
    for expected in (
        f"2:4 (2 of every 4 weights kept), {100 * zeros:.2f} % zeros found",
        f"9 layers, {sum(weights):,} weights",
        "wikitext2, 4,096 tokens",
        f"mean relative error{mean:.4f}",
        "0.9000 in model.layers.0.mlp.down_proj",
        "8 feasible, 1 optimal",
        "damping raised1 layer of 9model.layers.0.mlp.down_proj",
        "rank deficient1 layer of 9model.layers.1.self_attn.q_proj",
        "dead channelsno layer",
        "error_correction: block",
    ):
        assert expected in text


def test_unstructured_sparsity_names_its_group(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", layers(), sparsity="0.6", group="layer")
    assert "60 % zeros per layer" in Document(run_page(folder)).text


def test_data_block_is_strict_json(tmp_path: Path) -> None:
    records = [record(f"layers.0.{HOSTILE}", 0.25), record("layers.1.fc1", math.inf)]
    text = run_page(run_folder(tmp_path / "run", records))
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, 16)
    assert block
    rows = json.loads(block[1], parse_constant=lambda name: pytest.fail(name))
    assert rows[0] == {**records[0].to_dict(), "shape": [64, 64]}
    assert rows[1]["relative_error"] is None
    assert Document(text).rows[2][3] == "inf"


def test_matplotlib_is_imported_late_and_its_absence_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_folder(tmp_path / "run", layers())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    makers: tuple[Callable[[], str], ...] = (small_comparison, lambda: run_page(folder))
    for make in makers:
        with pytest.raises(UsageError, match=re.escape('pip install "layerwise[report]"')):
            make()
    for module in (report, page_module, plots):
        assert module.__file__
        tree = ast.parse(Path(module.__file__).read_text())
        imported = [
            ast.unparse(node) for node in tree.body if "import" in ast.unparse(node)
        ]
        assert not [line for line in imported if line.startswith("import matplotlib")]


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no results"):
        comparison_page([], {}, "layerwise demo")
    with pytest.raises(UsageError, match="no dense perplexity for llama"):
        comparison_page([result("wanda", 60.0)], {"opt": 50.0}, "layerwise demo")
    with pytest.raises(DataError, match="not an output of layerwise"):
        run_page(tmp_path)
    with pytest.raises(DataError, match="lists no layer"):
        run_page(run_folder(tmp_path / "run", []))


def test_write_report_replaces_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    write_report(path, "Ŵ \ud800")  # half a surrogate pair cannot be encoded
    assert path.read_text(encoding="utf-8") == "Ŵ ?"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_decimals_never_hide_a_value() -> None:
    shown = [page_module.decimal(v, 4) for v in (0.0, 0.12345, 3e-7, -3e-7, 1e9, math.inf)]
    assert shown == ["0.0000", "0.1235", "3.0e-07", "-3.0e-07", "1.0e+09", "inf"]
    assert unescape(page_module.breakable("a.b+<c>")) == "a.<wbr>b+<wbr><c>"

"""The benchmark on a real model: it goes on where it stopped, and hides nothing."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise
from layerwise.demo import calibration_text, evaluation_text, model_path
from layerwise.experiments.demo import all_methods
from layerwise.experiments.results import ResultStore
from tests.benchmarks import real_activations, real_cells, real_model
from tests.benchmarks.real_cells import Cell, Setting, measure
from tests.benchmarks.real_model import Results, cells, check, complete
from tests.benchmarks.real_tables import page

WANDA = Cell("wanda")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """A packaged model in the place of the real one."""
    folder = tmp_path_factory.mktemp("real")
    for name, text in (("a.txt", calibration_text()), ("b.txt", evaluation_text())):
        (folder / name).write_text(text[:60_000])
    return Setting(model_path("llama"), folder / "a.txt", folder / "b.txt", folder)


@pytest.fixture
def results(setting: Setting, tmp_path: Path) -> Results:
    """An empty store."""
    return Results(ResultStore(tmp_path / "real.jsonl"), setting)


def figures(value: float = 30.0) -> dict[str, Any]:
    """A result as it is stored."""
    return {
        "perplexity": value,
        "text": "Once\nupon a time",
        "seconds": 2.0,
        "cpu_seconds": 3.0,
        "peak_bytes": 5 << 20,
        "plan": {"bytes": 4 << 20},
        "mean_relative_error": 0.25,
        "layers": {"model.layers.0.mlp.up_proj": [0.2, 0.5, 0.1]},
    }


def fake(setting: Setting, asked: Any, jobs: int) -> Any:
    """Every run of magnitude is refused, and the others have a perplexity of 30."""
    for cell in asked:
        refused = cell.method == "magnitude"
        yield cell, {"refused": "it has no inputs"} if refused else figures()


def test_every_method_is_asked_for_and_the_quick_ones_with_every_pattern() -> None:
    zeros = cells()["zeros"]
    assert len(set(zeros)) == len(zeros)
    assert {cell.method for cell in zeros if cell.sparsity == "0.5"} == set(all_methods())
    for method in ("wanda", "sparsegpt", "fista", "alps"):
        assert {c.sparsity for c in zeros if c.method == method} == {"0.5", "2:4", "0.7"}


def test_different_runs_are_kept_apart(setting: Setting) -> None:
    asked = {cell for table in cells().values() for cell in table}
    assert len({str(cell.to_dict()) for cell in asked}) == len(asked)
    assert setting.fingerprint(WANDA) != setting.fingerprint(Cell("sparsegpt"))
    other = replace(setting, calibration=setting.evaluation)
    assert other.fingerprint(WANDA) != setting.fingerprint(WANDA)


def test_only_missing_runs_are_done(
    results: Results, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real_model, "in_processes", fake)
    results.add(WANDA, figures(77.0))
    complete(results, [WANDA, Cell("sparsegpt"), Cell("magnitude")], jobs=1)
    log = capsys.readouterr().err
    assert "1 of 3 runs are there" in log
    assert "2/2, 0 min left: magnitude: refused: it has no inputs" in log
    stored = results.find(WANDA)
    assert stored is not None
    assert stored["perplexity"] == 77


def test_the_check_shows_the_stored_figure_and_the_new_one(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_model, "in_processes", fake)
    results.add(WANDA, figures(77.0))
    lines = check(results, [WANDA, Cell("sparsegpt")], jobs=1, count=3)
    assert lines[2:] == ["| wanda | perplexity 77.0000, 3 s | perplexity 30.0000, 3 s |"]


def test_the_page_shows_what_is_missing_and_what_was_refused() -> None:
    found: Mapping[Cell, Any] = {
        WANDA: figures(),
        Cell("sparsegpt"): {**figures(25.0), "cpu_seconds": 1.5},
        Cell("magnitude"): {"refused": "no"},
        Cell("dense"): figures(20.0),
        Cell("sparsegpt", targets="re:.*(o_proj)"): figures(22.0),
        Cell("best", certify=True): figures(),
    }
    lines = page(cells(), found.get)
    row = next(line for line in lines if line.startswith("| wanda |"))
    assert row == "| wanda | 30.00 | … | … | 0.2500 | 3 | 2.00 | 5 MiB | 4 MiB |"
    assert any(line.startswith("| magnitude | refused | … |") for line in lines)
    assert any(line.startswith("| o_proj | +0.0953 |") for line in lines)
    assert "| up_proj | 0.2000 | 50.0% |" in lines
    assert "- **wanda**: Once upon a time" in lines
    assert lines[-1].startswith(f"{len({c for t in cells().values() for c in t}) - 6} of")


def test_a_run_is_measured_and_removed(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_cells, "LENGTH", 64)
    monkeypatch.setattr(real_cells, "EVALUATION_WINDOWS", 4)
    monkeypatch.setattr(real_cells, "NEW_TOKENS", 2)
    short = {"steps": 1, "batch_size": 1, "n_sequences": 8, "sequence_length": 32}
    monkeypatch.setattr(real_cells, "RETRAIN", short)
    dense = measure(setting, Cell("dense"))
    cell = Cell("magnitude", "0.9", n_sequences=2)
    pruned = measure(setting, cell)
    assert pruned["perplexity"] > 1.5 * dense["perplexity"]
    assert pruned["sparsity"] == pytest.approx(0.9, abs=0.01)
    assert pruned["peak_bytes"] > 100 << 20
    assert pruned["plan"]["bytes"] > 100 << 20
    retrained = measure(setting, replace(cell, retrain="norms"))
    assert 0 < retrained["retrain"]["fraction"] < 0.01
    refused = measure(setting, replace(cell, sparsity="1.5"))
    assert "1.5" in refused["refused"]
    assert {path.name for path in setting.folder.iterdir()} == {"a.txt", "b.txt"}


def test_activations_are_found_where_they_are() -> None:
    model = layerwise.load(model_path("llama"))
    tokens = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    lines = real_activations.table(model, tokens)
    assert len(lines) == 2 + len(model.model.layers)
    hidden = torch.ones(2, 16, 8)
    hidden[1, 3, 5] = -70
    assert real_activations.hidden_row(hidden) == ["70", "70", "3", "5"]
    first = torch.zeros(1, 2, 2)
    first[0, 0, 1], first[0, 1, 0] = 3, 1
    assert real_activations.shares(first) == ["90.0%", "90.0%"]

"""Proven gaps in a run: record, log line, report, and what is refused."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.errors import UsageError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Unstructured
from layerwise.reports.progress import PlainProgress, layer_line
from layerwise.reports.report import run_page
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.journal import read_layers
from layerwise.run.pipeline.records import in_percent
from layerwise.run.prune import prune_model
from layerwise.run.settings import Settings
from layerwise.solve import chain
from layerwise.solvers.best import Best
from layerwise.solvers.magnitude import Magnitude
from layerwise.solvers.sparsegpt import SparseGPT
from tests.support.models import random_tokens, tiny_model
from tests.support.pruning import prune_and_record
from tests.support.tolerances import RECORDED_ERROR

LENGTH = 12
SETTINGS: Mapping[str, Any] = {
    "calibration": random_tokens(6, LENGTH),
    "n_sequences": 6,
    "sequence_length": LENGTH,
    "targets": ["re:.*1.*q_proj", "re:.*1.*down_proj"],
}


def test_folder_log_and_report_say_how_far_the_optimum_can_be(tmp_path: Path) -> None:
    stream = io.StringIO()
    report = prune_model(
        tiny_model("llama", dtype=torch.float64),
        "sparsegpt",
        0.5,
        **SETTINGS,
        certify=True,
        output_dir=tmp_path / "out",
        callbacks=[PlainProgress(stream)],
    )
    records = read_layers(tmp_path / "out")
    assert records == list(report.records)
    page = run_page(tmp_path / "out")
    assert page.count(">proven gap</th>") == 1
    for record in records:
        assert record.proven_gap is not None
        assert 0 < record.proven_gap < 1
        shown = in_percent(record.proven_gap)
        assert f"proven within {shown} of the optimum" in layer_line(record)
        assert layer_line(record) in stream.getvalue()
        assert shown in page
    middle = report.median_proven_gap
    assert middle is not None
    assert (
        f"proven within {in_percent(middle)} of the optimum (median)" in stream.getvalue()
    )
    assert f"median {in_percent(middle)}" in page
    assert Recipe.read(tmp_path / "out" / "recipe.yaml").certify is True


def test_nothing_of_it_where_it_was_not_asked_for(tmp_path: Path) -> None:
    stream = io.StringIO()
    report = prune_model(
        tiny_model("llama", dtype=torch.float64),
        "wanda",
        0.5,
        **SETTINGS,
        output_dir=tmp_path / "out",
        callbacks=[PlainProgress(stream)],
    )
    assert {record.proven_gap for record in report.records} == {None}
    assert report.median_proven_gap is None
    assert "proven" not in stream.getvalue()
    assert "proven gap" not in run_page(tmp_path / "out").lower()
    assert "certify" not in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gap_is_that_of_the_stored_weights(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the damped problem that was solved, C != G included."""
    model = tiny_model("llama", dtype=dtype)
    report, problems = prune_and_record(
        monkeypatch,
        model,
        method="wanda",
        sparsity="2:4",
        calibration=SETTINGS["calibration"],
        targets=SETTINGS["targets"],
        error_correction="full",
        damping=0.03,
        certify=True,
    )
    for record in report.records:
        problem = problems[record.name]
        weight = model.get_submodule(record.name).weight.data
        value = objective_rows(problem, weight, damped=True).sum()
        bound = lw.lower_bounds(problem, weight).sum()
        expected = 1 - float(bound / value)
        assert record.proven_gap == pytest.approx(expected, rel=RECORDED_ERROR)


def test_damping_that_was_raised_is_that_of_the_gap() -> None:
    """SparseGPT raises it where tokens are few, and at that damping the gram says more."""
    settings = {**SETTINGS, "damping": 0.0, "certify": True, "n_sequences": 1}
    model = tiny_model("llama", dtype=torch.float64)
    raised = prune_model(model, "sparsegpt", 0.5, **settings).records
    model = tiny_model("llama", dtype=torch.float64)
    singular = prune_model(model, "magnitude", 0.5, **settings).records
    assert any(record.damping_raised for record in raised)
    for with_damping, without in zip(raised, singular, strict=True):
        if with_damping.damping_raised:
            assert without.proven_gap == 1
            assert with_damping.proven_gap is not None
            assert with_damping.proven_gap < 1


def test_on_by_default_where_the_effort_is_thorough() -> None:
    half, thorough = Unstructured(0.5), Best(effort="thorough")
    mask = FixedMask(torch.ones(2, 2, dtype=torch.bool))

    def certified(method: Any, pattern: Any, certify: bool | None = None) -> bool | None:
        settings = Settings.of(method, pattern=pattern, certify=certify)
        return settings.removal.method.certify

    for pattern in (half, NM(2, 4), mask):
        assert certified(thorough, pattern)
        assert certified(chain(Magnitude(), thorough), pattern)
        assert not certified(thorough, pattern, certify=False)
        assert not certified(Best(), pattern)
        assert certified(SparseGPT(), pattern, certify=True)
    assert not Settings.of(thorough, 0.2, "columns").removal.method.certify


def test_smaller_models_have_no_bound() -> None:
    with pytest.raises(UsageError, match="certify"):
        prune_model(
            tiny_model("llama"),
            "columns",
            0.2,
            pattern="columns",
            **SETTINGS,
            certify=True,
        )


def test_percent_is_never_below_the_gap() -> None:
    assert in_percent(0.23411) == "23.5 %"
    assert in_percent(0.99999) == "100.0 %"
    assert in_percent(0.0) == "0.0 %"
    assert in_percent(1e-9) == "0.1 %"

"""Demonstration: the packaged models are there, small, trained, and worth pruning."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise import demo
from layerwise.cli import run
from layerwise.errors import DataError, UsageError
from layerwise.experiments import demo as run_demo
from layerwise.experiments import experiment
from layerwise.experiments.demo import MAIN_METHODS, all_methods, compare, demo_models
from layerwise.experiments.experiment import Experiment, PackagedModel
from layerwise.experiments.results import ResultStore
from layerwise.patterns import Unstructured
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.perplexity import perplexity
from layerwise.run.data.tokens import encode
from layerwise.run.models.architecture import embedding_rows
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import load_model
from layerwise.run.settings import Settings
from layerwise.solvers import SOLVERS
from layerwise.solvers.columns import ColumnPruning

LIMIT = 4 * 10**6  # bytes of a packaged model
LENGTH = 256  # the context that they were trained with
WINDOWS = 12
TRAINED = 50  # perplexity; a uniform guess among the 1024 tokens has 1024
HARM = 1.2  # perplexity of half the weights over that of all


@cache
def evaluation_tokens() -> Tensor:
    tokenizer = load_tokenizer(Checkpoint.open(demo.model_path("llama")))
    assert tokenizer is not None
    text = demo.evaluation_text()
    return encode(text[: len(text) // 4], tokenizer)[: WINDOWS * LENGTH]


def perplexity_of(model: Any) -> float:
    return perplexity(model, evaluation_tokens(), sequence_length=LENGTH)


@pytest.mark.parametrize("name", demo.MODELS)
def test_packaged_model_is_small_and_opens(name: str) -> None:
    folder = demo.model_path(name)
    assert folder.is_dir(), f"{folder} is missing: python -m layerwise.demo.train {name}"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < LIMIT
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config["model_type"] == name
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    model = load_model(checkpoint)
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) <= embedding_rows(model)
    suffixes = {".json", ".safetensors"}  # what the package installs
    assert {path.suffix for path in folder.iterdir()} == suffixes


@pytest.mark.parametrize("name", demo.MODELS)
def test_packaged_models_share_a_lossless_tokenizer(name: str) -> None:
    tokenizer = load_tokenizer(Checkpoint.open(demo.model_path(name)))
    assert tokenizer is not None
    text = demo.evaluation_text()[:5000]
    tokens = encode(text, tokenizer)
    assert tokenizer.decode(tokens) == text
    assert torch.equal(tokens[:LENGTH], evaluation_tokens()[:LENGTH])


@pytest.mark.parametrize("name", demo.MODELS)
def test_packaged_model_is_trained_and_pruning_hurts(name: str) -> None:
    model = load_model(Checkpoint.open(demo.model_path(name)))
    dense = perplexity_of(model)
    assert dense < TRAINED
    with torch.no_grad():
        for layer, module in model.named_modules():
            if isinstance(module, nn.Linear) and "lm_head" not in layer:
                mask = Unstructured(0.5).mask(module.weight.abs())
                module.weight.mul_(mask)
    assert perplexity_of(model) > HARM * dense


def test_unknown_packaged_model() -> None:
    with pytest.raises(UsageError, match="choose from opt, llama, mamba"):
        demo.model_path("bert")


# --- texts -------------------------------------------------------------------------------


def test_held_out_modules_are_not_trained_on() -> None:
    assert demo.CALIBRATION
    assert demo.EVALUATION
    assert not set(demo.CALIBRATION) & set(demo.EVALUATION)
    assert len(set(demo.CALIBRATION)) == len(demo.CALIBRATION)
    assert len(set(demo.EVALUATION)) == len(demo.EVALUATION)
    calibration = demo.calibration_text()
    paragraphs = [p for p in demo.evaluation_text().split("\n\n") if len(p) > 400]
    assert len(paragraphs) > 50
    assert not any(paragraph in calibration for paragraph in paragraphs)


def test_texts_are_large_enough() -> None:
    assert len(demo.calibration_text()) > 2 * 10**6
    assert len(demo.evaluation_text()) > 2 * 10**5
    assert len(evaluation_tokens()) == WINDOWS * LENGTH


def test_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {"stdlib": str(tmp_path)}
    monkeypatch.setattr("layerwise.demo.sysconfig.get_paths", lambda: paths)
    with pytest.raises(DataError, match=rf"{demo.EVALUATION[0]} cannot be read"):
        demo.evaluation_text()


# --- comparison --------------------------------------------------------------------------


@pytest.fixture
def _reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer windows, and a text that is encoded in no time."""
    text = demo.calibration_text()[: 2 * 10**5]
    monkeypatch.setattr(experiment, "calibration_text", lambda: text)
    monkeypatch.setattr(experiment, "N_SEQUENCES", 4)
    monkeypatch.setattr(experiment, "EVALUATION_TOKENS", WINDOWS * LENGTH)


@pytest.mark.usefixtures("_reduced")
def test_comparison() -> None:
    told: list[Any] = []
    methods = ("magnitude", "wanda")
    found = compare(("llama",), methods, on_result=lambda *pair: told.append(pair))
    dense = found.dense_perplexity["llama"]
    assert [result for result, _ in told] == list(found.results)
    assert {value for _, value in told} == {dense}
    keys = [(r.model, r.pattern, r.method) for r in found.results]
    assert keys == [("llama", p, m) for p in ("0.5", "2:4") for m in methods]
    for magnitude, wanda in zip(found.results[::2], found.results[1::2], strict=True):
        assert wanda.mean_relative_error < magnitude.mean_relative_error
        assert dense < wanda.perplexity < magnitude.perplexity
        assert len(wanda.records) == len(magnitude.records) == 4 * 7


@pytest.mark.usefixtures("_reduced")
def test_every_matrix_of_the_packaged_mamba_is_pruned() -> None:
    found = compare(("mamba",), ("magnitude",), ("2:4",))
    (result,) = found.results
    names = [record.name.rpartition(".")[2] for record in result.records]
    assert names == 4 * ["in_proj", "x_proj", "dt_proj", "out_proj"]
    assert {record.sparsity for record in result.records} == {0.5}
    assert result.perplexity > HARM * found.dense_perplexity["mamba"]


@pytest.mark.usefixtures("_reduced")
def test_interrupted_comparison_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    methods = ("magnitude", "wanda")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(("llama",), methods, ("0.5",), stop, ResultStore(path))
    assert len(ResultStore(path)) == 2  # the dense model and the first method
    done: list[str] = []
    answer = PackagedModel.answer

    def recorded(self: PackagedModel, asked: Experiment) -> dict[str, Any]:
        done.append(asked.method)
        return answer(self, asked)

    monkeypatch.setattr(PackagedModel, "answer", recorded)
    found = compare(("llama",), methods, ("0.5",), store=ResultStore(path))
    assert done == ["wanda"]
    again = compare(("llama",), methods, ("0.5",), store=ResultStore(path))
    assert done == ["wanda"]
    assert again == found
    assert [result.method for result in found.results] == list(methods)
    fresh = compare(("llama",), methods, ("0.5",))
    assert done == ["wanda", "dense", *methods]
    for one, other in zip(found.results, fresh.results, strict=True):
        assert one.perplexity == other.perplexity
        assert len(one.records) == len(other.records) == 4 * 7


@pytest.mark.usefixtures("_reduced")
def test_refused_pattern_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = ("magnitude", "least-squares")  # which needs a mask
    monkeypatch.setattr(run_demo, "MAIN_METHODS", methods)
    assert run(["demo", "--output", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for pattern in ("0.5", "2:4"):
        told = f"  llama {pattern} least-squares: not done, least-squares finds weights"
        assert any(line.startswith(told) for line in lines)


def test_fingerprint_names_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    before = PackagedModel("llama").fingerprint("wanda")
    assert PackagedModel("llama").fingerprint("wanda") == before
    assert PackagedModel("llama").fingerprint("magnitude") != before
    assert PackagedModel("llama").fingerprint("dense") != before
    assert PackagedModel("opt").fingerprint("wanda") != before
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "N_SEQUENCES", 4)
        assert PackagedModel("llama").fingerprint("wanda") != before
    for text in ("calibration_text", "evaluation_text"):
        with monkeypatch.context() as patch:
            patch.setattr(experiment, text, lambda: "another text")
            assert PackagedModel("llama").fingerprint("wanda") != before


def test_methods_are_all_solvers_and_possible() -> None:
    methods = all_methods()
    assert set(MAIN_METHODS) <= set(methods)
    assert len(set(methods)) == len(methods)
    assert "multi-weight" in methods  # multi-weight-mm is another name for it
    for name in SOLVERS.keys() - {"multi-weight-mm"}:
        whole_columns = isinstance(SOLVERS[name](), ColumnPruning)
        assert (name in methods or f"wanda+{name}" in methods) is not whole_columns
    for method in methods:
        Settings.of(method, 0.5)


def test_models_of_the_command() -> None:
    assert demo_models(False) == ("llama",)
    assert demo_models(True) == demo.MODELS


@pytest.mark.usefixtures("_reduced")
def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_demo, "MAIN_METHODS", ("magnitude", "wanda+least-squares"))
    assert run(["demo", "--output", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr().out
    assert "llama: dense perplexity" in printed
    rows = [line.replace("│", " ").split()[:2] for line in printed.splitlines()]
    for pattern in ("0.5", "2:4"):
        for method in ("magnitude", "wanda+least-squares"):
            assert [pattern, method] in rows
    page = (tmp_path / "new" / "folder" / "report.html").read_text()
    assert "Pruning methods compared" in page
    assert "layerwise demo" in page
    assert not (tmp_path / "new" / "folder" / "results.jsonl").exists()


@pytest.mark.usefixtures("_reduced")
def test_repeated_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_demo, "all_methods", lambda: ("magnitude", "wanda"))
    monkeypatch.setattr(run_demo, "MODELS", ("llama",))
    assert run(["demo", "--all", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "continuing" not in printed
    monkeypatch.setattr(PackagedModel, "answer", None)  # nothing is computed again
    assert run(["demo", "--all", "--output", str(tmp_path)]) == 0
    assert f"continuing {tmp_path / 'results.jsonl'}" in capsys.readouterr().out

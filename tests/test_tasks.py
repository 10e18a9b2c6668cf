"""Benchmark tasks: scores of lm-eval are those of the model, and nothing is left behind."""

import json
import logging
import math
import os
import random
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import layerwise
from layerwise.cli import run
from layerwise.demo import MODELS, model_path
from layerwise.errors import DataError
from layerwise.reports.lines import Lines
from layerwise.reports.tables import print_scores
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.tasks import Score, TaskScores, find_tasks, score_tasks
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.native import save_native
from layerwise.run.models.surgery import shrink
from tests.support.cutting import model_of, random_cuts

WORDS = "def class return import self None True False if else".split()
QUESTIONS = [
    *("import os\nimport", "def f(self):\n    return", "x = []\nfor y in x:\n    if"),
    *("class A:\n    def", "try:\n    pass\nexcept", "from os", "assert not", "raise"),
]
DOCUMENTS: list[dict[str, Any]] = [
    {"question": question, "choices": WORDS[i : i + 4], "answer": i % 4}
    for i, question in enumerate(QUESTIONS)
]
WORD_TASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.5},
}
WRITING_TASK = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks on one file, a task whose file is not there, and a group."""
    folder = tmp_path_factory.mktemp("own tasks")
    lines = [json.dumps(document) for document in DOCUMENTS]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    for name, file, task in (
        ("words", "documents", WORD_TASK),
        ("writing", "documents", WRITING_TASK),
        ("lost", "nowhere", WORD_TASK),
    ):
        data = {
            "data_files": {"test": str(folder / f"{file}.jsonl")},
            "cache_dir": str(folder / "cache"),
        }
        source = {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(
            yaml.safe_dump({"task": name, **source, **task})
        )
    metrics = [{"metric": "acc"}]
    group = {"group": "both", "task": ["words"], "aggregate_metric_list": metrics}
    (folder / "both.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged LLaMA with fewer channels, which stock transformers cannot open."""
    folder = tmp_path_factory.mktemp("native")
    model, adapter = model_of("demo-llama")
    shrink(model, adapter, random_cuts(model, adapter, ["mlp"]), "native")
    save_native(model, folder)
    for file in model_path("llama").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    called: list[Any] = []
    monkeypatch.setattr("datasets.config.HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **_: called.append(a))
    yield
    assert not called


def tokenizer_of(folder: Path) -> Any:
    return load_tokenizer(Checkpoint.open(folder))


def accuracy(model: Any, tokenizer: Any) -> float:
    """Share of documents whose answer has the largest probability, one by one."""
    right = 0
    for document in DOCUMENTS:
        context = tokenizer(document["question"])["input_ids"]
        sums = []
        for choice in document["choices"]:
            ids = tokenizer(f"{document['question']} {choice}")["input_ids"]
            assert ids[: len(context)] == context
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            places = range(len(context), len(ids))
            sums.append(sum(float(scores[place - 1, ids[place]]) for place in places))
        right += sums.index(max(sums)) == document["answer"]
    return right / len(DOCUMENTS)


def state_of_the_process() -> list[Any]:
    numpy: Any = np.random.get_state()
    return [
        random.getstate(),
        (numpy[1].tolist(), numpy[2]),
        torch.get_rng_state().tolist(),
        dict(os.environ),
        list(warnings.filters),
        logging.root.manager.disable,
        sys.stdout,
        sys.stderr,
    ]


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_the_model(
    name: str, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = layerwise.load(model_path(name)).float()
    tokenizer = tokenizer_of(model_path(name))
    tokenizer.pad_token = None
    model.train()
    before = state_of_the_process()
    manager = find_tasks(["words"], task_folder)
    assert manager.all_tasks == ["both", "lost", "words", "writing"]
    found = score_tasks(model, tokenizer, ["words"], manager=manager)
    assert state_of_the_process() == before
    assert model.training
    assert tokenizer.pad_token is None
    assert capsys.readouterr() == ("", "")

    expected = accuracy(model.eval(), tokenizer)
    assert 0 < expected < 1
    stderr = (expected * (1 - expected) / (len(DOCUMENTS) - 1)) ** 0.5
    (score,) = found.scores
    assert score.stderr == pytest.approx(stderr)
    assert score == Score(
        task="words",
        metric="acc",
        filter="none",
        value=expected,
        stderr=score.stderr,
        higher_is_better=True,
        n_examples=len(DOCUMENTS),
        n_shots=0,
        version="1.5",
    )


def test_groups_are_scored(task_folder: Path) -> None:
    from lm_eval.tasks import TaskManager

    model, tokenizer = (
        layerwise.load(model_path("llama")),
        tokenizer_of(model_path("llama")),
    )
    manager = TaskManager(include_path=task_folder, include_defaults=False)
    found = score_tasks(model, tokenizer, ["both"], manager=manager, limit=3).scores
    assert [score.task for score in found] == ["words", "both"]
    assert found[0].value == found[1].value
    assert [score.n_examples for score in found] == [3, 3]


def test_command_on_a_native_folder(
    task_folder: Path,
    native_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # on a busy machine, a step takes so long that it gets a line
    unhurried = partial(Lines, patience=math.inf, silence=math.inf)
    monkeypatch.setattr("layerwise.reports.lines.Lines", unhurried)
    text = tmp_path / "text.txt"
    text.write_text("import os\n" * 100)
    arguments = ["evaluate", str(native_folder), "--task-folder", str(task_folder)]
    arguments += ["--tasks", "words, writing", "--limit", "5"]
    arguments += ["--json", str(tmp_path / "scores.json")]
    assert run([*arguments, "--dataset", str(text), "--sequence-length", "16"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    perplexity, heading, *rows = printed.out.splitlines()
    assert perplexity.startswith("perplexity ")
    assert heading.split() == "task metric score standard error examples shots".split()

    manager = find_tasks(["words", "writing"], task_folder)
    model, tokenizer = layerwise.load(native_folder), tokenizer_of(native_folder)
    found = score_tasks(model, tokenizer, ["words", "writing"], manager=manager, limit=5)
    words, writing = found.scores
    assert rows[0].split() == ["words", "acc", *numbers(words), "5", "0"]
    metric = [writing.metric, "(first)"]
    assert rows[1].split() == ["writing", *metric, *numbers(writing), "5", "0"]
    assert len(rows) == 2
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["model"] == str(native_folder)
    assert written["limit"] == 5
    assert [Score(**score) for score in written["scores"]] == [words, writing]


def numbers(score: Score) -> list[str]:
    assert score.stderr is not None
    return [f"{score.value:.4f}", f"{score.stderr:.4f}"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    """A task is named once; a standard error that is not known stays empty."""
    scores = [
        Score("one", "acc", "none", 0.5, 0.1, True, 7, 2, "1"),
        Score("one", "f1", "strict", 0.25, None, True, 7, 2, "1"),
    ]
    print_scores(TaskScores("0", None, None, tuple(scores)))
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["one", "acc", "0.5000", "0.1000", "7", "2"]
    assert second.split() == ["f1", "(strict)", "0.2500"]


# --- bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("--limit 3 --speed", 2, "--limit is about tasks: give --tasks as well"),
        ("--json x.json --speed", 2, "--json is about tasks"),
        ("--task-folder . --speed", 2, "--task-folder is about tasks"),
        ("--tasks , --task-folder .", 2, "--tasks takes names with commas between them"),
        ("--tasks words --limit 0", 2, "--limit must be at least 1, got 0"),
        ("--tasks words --task-folder none", 2, "there is no task folder none"),
        ("--tasks words --task-folder empty", 2, "empty defines no task"),
        ("--tasks lost --task-folder .", 6, "lost cannot be evaluated: Unable to find"),
        pytest.param(
            *("--tasks wrods,arc_eazy,words --task-folder .", 2),
            "unknown task 'wrods' (did you mean words",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_bad_input(
    arguments: str,
    code: int,
    expected: str,
    task_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(task_folder)
    (task_folder / "empty").mkdir(exist_ok=True)
    before = sorted(task_folder.iterdir())
    assert run(["evaluate", str(model_path("llama")), *arguments.split()]) == code
    printed = capsys.readouterr()
    assert printed.err.startswith("layerwise: ")
    assert printed.err.count("\n") == 1
    assert expected in printed.err
    assert printed.out == ""
    if "arc_eazy" in arguments:
        assert "'arc_eazy' (did you mean arc_easy or " in printed.err
        assert "'words'" not in printed.err
    assert set(task_folder.iterdir()) - set(before) <= {task_folder / "cache"}


def test_a_tokenizer_is_needed(
    task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(model_path("llama") / file, tmp_path)
    arguments = ["--tasks", "words", "--task-folder", str(task_folder)]
    assert run(["evaluate", str(tmp_path), *arguments]) == DataError.exit_code
    assert "has no tokenizer" in capsys.readouterr().err


def test_without_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the model is opened."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["evaluate", "./none", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err == (
        'layerwise: tasks are evaluated by lm-eval: pip install "layerwise[eval]"\n'
    )

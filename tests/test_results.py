"""Kept results: an interrupted comparison goes on, and nothing outdated is taken."""

import os
from pathlib import Path

import pytest

from layerwise.errors import DataError
from layerwise.experiments import results
from layerwise.experiments.results import ResultStore
from layerwise.experiments.sources import code_identity, source_hash

TASK = {"model": "llama", "method": "wanda", "seed": 0}
OTHER = {**TASK, "seed": 1}


# --- the file ----------------------------------------------------------------------------


def test_results_are_there_after_reopening(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    store = ResultStore(path)
    assert len(store) == 0
    store.add(TASK, "a", {"perplexity": 20.5})
    store.add(OTHER, "a", {"perplexity": float("inf")})
    again = ResultStore(path)
    assert len(again) == 2
    assert again.find(dict(reversed(TASK.items())), "a") == {"perplexity": 20.5}
    assert again.find(OTHER, "a") == {"perplexity": float("inf")}
    assert again.find({**TASK, "method": "magnitude"}, "a") is None


def test_result_of_another_fingerprint_is_not_taken_but_replaced(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    ResultStore(path).add(TASK, "old", {"perplexity": 1.0})
    store = ResultStore(path)
    assert store.find(TASK, "new") is None
    store.add(TASK, "new", {"perplexity": 2.0})
    again = ResultStore(path)
    assert len(again) == 1
    assert again.find(TASK, "new") == {"perplexity": 2.0}
    assert again.find(TASK, "old") is None


def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.jsonl"
    store = ResultStore(path)
    store.add(TASK, "a", {"perplexity": 1.0})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(DataError, match="No space left"):
            store.add(OTHER, "a", {"perplexity": 2.0})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_path_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "atomic_write", None)
    store = ResultStore()
    store.add(TASK, "a", {"perplexity": 1.0})
    assert store.find(TASK, "a") == {"perplexity": 1.0}


@pytest.mark.parametrize("line", ['{"task": {}', "[1]", '{"task": {}, "result": {}}'])
def test_damaged_file_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    ResultStore(path).add(TASK, "a", {"perplexity": 1.0})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"results\.jsonl, line 2"):
        ResultStore(path)


# --- the code behind them ----------------------------------------------------------------


def package(folder: Path, **changes: str) -> Path:
    """A package with a solver that imports another module, and a third module."""
    modules = {
        "solvers/one": '"""One."""\nfrom layerwise.two import helper\n\nx = helper(1)\n',
        "two": "def helper(x):\n    return x\n",
        "three": "y = 1\n",
        "solvers/__init__": "from layerwise.solvers.one import x\n",
        **changes,
    }
    for name, text in modules.items():
        path = (folder / name).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({"solvers/one": "from layerwise.two import helper\n\nx = helper(2)\n"}, True),
        ({"two": "def helper(x):\n    return -x\n"}, True),
        ({"two": 'def helper(x):\n    """Help."""\n    return x  # as it is\n'}, False),
        ({"three": "y = 2\n"}, False),
        ({"solvers/__init__": "from layerwise.three import y\n"}, False),
    ],
    ids=["its code", "imported code", "words only", "not imported", "registry"],
)
def test_hash_follows_what_the_code_does(
    tmp_path: Path, change: dict[str, str], counts: bool
) -> None:
    modules = ["layerwise.solvers.one", "layerwise.solvers", "torch.nn"]
    before = source_hash(modules, package(tmp_path / "before"))
    after = source_hash(modules, package(tmp_path / "after", **change))
    assert (before != after) is counts


def test_identity_tells_methods_and_options_apart() -> None:
    methods = ("fista", "fista-paper", "sparsegpt", "wanda+least-squares", "wanda", None)
    found = {name: code_identity(name, ["layerwise.solve"]) for name in methods}
    assert found["fista"]["sources"] == found["fista-paper"]["sources"]
    assert found["fista"]["method"] != found["fista-paper"]["method"]
    assert len({found[name]["sources"] for name in methods}) == len(methods) - 1
    assert found["wanda"] == code_identity("wanda", ["layerwise.solve"])

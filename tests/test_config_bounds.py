"""Numbers of config.json that no model has: refused before they take any memory."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import DataError, UnsupportedModelError
from layerwise.run.checkpoints.config_bounds import check_counts
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models import skeleton
from layerwise.run.models.headers import Headers
from layerwise.run.models.opening import load
from layerwise.run.models.residency import Streamed
from layerwise.run.models.skeleton import read_config
from tests.support.models import save_checkpoint, tiny_model

SECONDS = 5.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bounds") / "llama"
    return save_checkpoint(folder, tiny_model("llama"), tokenizer=False)


def changed(source: Path, folder: Path, changes: Mapping[str, Any]) -> Path:
    """The folder with other values in its config.json."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).hardlink_to(path)
    config = json.loads((source / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


ABSURD: Mapping[str, Mapping[str, Any]] = {
    "labels": {"num_labels": 300_000_000},
    "labels as a float": {"num_labels": 3e8},
    "labels of a part": {"text_config": {"num_labels": 300_000_000}},
    "layers": {"num_hidden_layers": 10**9},
    "layers by another name": {"decoder_layers": 10**9},
    "experts": {"num_local_experts": 300_000_000},
    "heads": {"num_attention_heads": 10**12},
    "counts in a list": {"num_experts_by_stage": [4, 10**9]},
    "more layers than tensors": {"num_hidden_layers": 16_000},
    "vocabulary": {"vocab_size": 300_000_000},
    "width": {"hidden_size": 400_000_000},
    "inner width": {"intermediate_size": 10**15},
    "size that overflows": {"intermediate_size": 10**30},
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_numbers_are_refused_at_once(case: str, llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "m", ABSURD[case])
    start = time.process_time()
    opens = (
        lambda: load(folder),
        lambda: Streamed.open(Checkpoint.open(folder)),
        lambda: Headers.read(Checkpoint.open(folder)),
    )
    for opening in opens:
        with pytest.raises(DataError) as caught:
            opening()
        assert len(str(caught.value)) < 700
    assert time.process_time() - start < SECONDS


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": 10**12},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10**12}},
        {"num_labels": 4096},
        {"num_parameters": 7_000_000_000, "n_tokens_seen": 10**13},
        {"total_flos": 10**24, "num_train_samples": 10**9},
    ],
)
def test_large_numbers_that_take_no_memory_are_accepted(
    changes: Mapping[str, Any], llama: Path, tmp_path: Path
) -> None:
    assert load(changed(llama, tmp_path / "m", changes)).num_parameters() > 0


def test_limits_are_wider_than_any_published_model() -> None:
    known = {"num_experts": 16_384, "num_labels": 30_522, "num_hidden_layers": 1_000}
    check_counts(known, Path("config.json"))


def test_tables_that_no_tensor_bounds_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of positions are computed, so their size follows from config.json alone."""
    source = save_checkpoint(tmp_path / "m", tiny_model("llama"), tokenizer=False)
    config = read_config(Checkpoint.open(source))
    build = skeleton._build

    def with_table(*args: Any) -> Any:
        model = build(*args)
        model.register_buffer("table", torch.empty(1 << 20, 1 << 10, device="meta"))
        return model

    monkeypatch.setattr(skeleton, "_build", with_table)
    with pytest.raises(DataError, match=r"tables of 4,29\d,.* number of positions"):
        skeleton.skeleton_of(Checkpoint.open(source), config, buffers=True)


@pytest.mark.parametrize("kind", ["a" * 100_000, "gpt" + "9" * 100_000])
def test_a_long_model_type_is_not_repeated(kind: str, llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "m", {"model_type": kind})
    with pytest.raises(UnsupportedModelError, match="does not know it") as caught:
        load(folder)
    assert len(str(caught.value)) < 300


def test_a_long_key_is_not_repeated(llama: Path, tmp_path: Path) -> None:
    folder = changed(llama, tmp_path / "m", {})
    key = json.dumps("k" * 100_000)
    (folder / "config.json").write_text(f"{{{key}: 1, {key}: 2}}")
    with pytest.raises(DataError, match="appears twice") as caught:
        Checkpoint.open(folder)
    assert len(str(caught.value)) < 300

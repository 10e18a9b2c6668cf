"""Files beside the weights: what is copied, and what no command may open."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import DataError
from layerwise.grams.layer_files import read_layers
from layerwise.run.checkpoints import files
from layerwise.run.checkpoints.files import check_regular, copy_file, read_bytes
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.calibration import token_windows
from layerwise.run.data.evaluation import evaluation_text
from layerwise.run.models.headers import Headers
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.prune import prune_model
from tests.support.models import random_tokens, save_checkpoint, tiny_model

DATA: Any = {"calibration": random_tokens(4, 12), "n_sequences": 4, "sequence_length": 12}
MODELS = (  # what transformers or a licence needs
    "LICENSE.txt",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)
OTHERS = (  # what people leave beside a model
    "alpaca.json",
    "all_results.json",
    "corpus.txt",
    "notes.txt",
    "optimizer.pt",
    "train.py",
    "trainer_state.json",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "model", tiny_model("llama"))


def add(folder: Path, name: str, text: str = "{}") -> None:
    (folder / name).write_text(text)


def test_only_the_files_of_a_model_are_copied(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 7)
    for name in (*MODELS, *OTHERS):
        add(source, name, json.dumps({"text": name * 20}))
    prune_model(source, "magnitude", 0.5, output_dir=tmp_path / "out", **DATA)
    for name in MODELS:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not [name for name in OTHERS if (tmp_path / "out" / name).exists()]


def test_code_is_copied_with_a_model_that_names_it(source: Path) -> None:
    add(source, "modeling_mine.py", "")
    assert "modeling_mine.py" not in Checkpoint.open(source).side_files()
    config = json.loads((source / "config.json").read_text())
    add(source, "config.json", json.dumps(config | {"auto_map": {}}))
    assert "modeling_mine.py" in Checkpoint.open(source).side_files()


@pytest.mark.parametrize(
    "text",
    ["[]", "null", "3", '"x"', "[" * 100_000, '{"max_new_tokens": -4}'],
    ids=["list", "null", "number", "text", "deep", "negative"],
)
def test_settings_of_generation_that_transformers_refuses(source: Path, text: str) -> None:
    """A run would write a folder that does not open."""
    add(source, "generation_config.json", text)
    with pytest.raises(DataError, match=r"cannot use .*generation_config\.json") as caught:
        Headers.read(Checkpoint.open(source))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", '{"temperature": -1}', "{}"])
def test_settings_of_generation_that_transformers_ignores(source: Path, text: str) -> None:
    add(source, "generation_config.json", text)
    Headers.read(Checkpoint.open(source))


@pytest.mark.parametrize("metadata", [None, [], "absent"])
def test_index_without_metadata_is_refused(tmp_path: Path, metadata: Any) -> None:
    source = save_checkpoint(tmp_path / "m", tiny_model("llama"), max_shard_size="9KB")
    path = source / "model.safetensors.index.json"
    index = json.loads(path.read_text()) | {"metadata": metadata}
    if metadata == "absent":
        del index["metadata"]
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match="has no metadata"):
        Checkpoint.open(source)
    path.write_text(json.dumps(index | {"metadata": {}}))
    Checkpoint.open(source)


# --- pipes, devices and folders ----------------------------------------------------------

STRANGE: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("make", STRANGE.values(), ids=list(STRANGE))
def test_nothing_but_files_is_opened(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    for name in ("text.txt", "text.jsonl", "recipe.yaml", "grams.safetensors"):
        make(tmp_path / name)
    text, lines = str(tmp_path / "text.txt"), f"{tmp_path / 'text.jsonl'}:text"
    readers: list[Callable[[], Any]] = [
        lambda: check_regular(tmp_path / "text.txt"),
        lambda: read_bytes(tmp_path / "text.txt"),
        lambda: copy_file(tmp_path / "text.txt", tmp_path / "copy"),
        lambda: token_windows(text, None, n_sequences=1, sequence_length=2),
        lambda: evaluation_text(text),
        lambda: evaluation_text(lines),
        lambda: Recipe.read(tmp_path / "recipe.yaml"),
    ]
    if make is not Path.mkdir:  # a folder of grams is one
        readers.append(lambda: list(read_layers(tmp_path / "grams.safetensors")))
    for read in readers:
        with pytest.raises(DataError, match="is not a regular file"):
            read()
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("make", [os.mkfifo, STRANGE["device"]])
@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"]
)
def test_no_pipe_of_a_model_is_opened(
    source: Path, name: str, make: Callable[[Path], Any]
) -> None:
    (source / name).unlink()
    make(source / name)
    with pytest.raises(DataError, match=f"{name} is (not a regular|a link that leaves)"):
        Checkpoint.open(source)


def test_huge_file_is_not_read_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with path.open("wb") as stream:
        stream.truncate(20 << 30)
    with pytest.raises(DataError, match=r"at most \d+ are read"):
        Recipe.read(path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300])
def test_name_that_no_file_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_bytes(tmp_path / name)

"""Damaged and hostile checkpoints: one line that says what is wrong, and nothing is left.

Every command that opens a model folder is a line of `COMMANDS`, and meets every case of
`REFUSED`.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from layerwise.cli import run
from layerwise.errors import DataError, LayerwiseError, UnsupportedModelError
from layerwise.run.checkpoints.storage import Checkpoint
from tests.support.checkpoints import INDEX, write_checkpoints
from tests.support.damages import (
    absolute,
    config_with,
    duplicate_header_key,
    duplicate_key,
    edit_index,
    empty_tensors,
    endless_header,
    first_shard,
    folder_as_shard,
    foreign_code,
    foreign_tokenizer,
    link_outside,
    link_to_device,
    negative_size,
    no_weights,
    pickles_only,
    pipe,
    remove,
    remove_tensor,
    shift,
    tensor_in_two_shards,
    traverse,
    truncate,
    unlisted_tensor_gone,
    weight_with,
    with_header,
    write,
)
from tests.support.models import tiny_text

SECONDS = 5.0  # of the processor, for any refusal
COMMANDS: Mapping[str, Sequence[str]] = {
    "prune": (
        "prune MODEL --method magnitude --sparsity 0.5 --calibration text.txt --output out "
        "--n-sequences 2 --sequence-length 8"
    ).split(),
    "evaluate": "evaluate MODEL --dataset text.txt --sequence-length 8".split(),
}


# --- the table ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is done to a good folder, the error, and a part of its line.

    `early` says that opening the folder refuses it, before transformers sees it; `model`
    is what the command is given in place of the folder.
    """

    damage: Callable[[Path], object]
    error: type[LayerwiseError]
    match: str
    early: bool = True
    model: str = "opt"


def early(damage: Callable[[Path], object], match: str) -> Case:
    return Case(damage, DataError, match)


def late(damage: Callable[[Path], object], match: str) -> Case:
    return Case(damage, DataError, match, early=False)


REFUSED: Mapping[str, Case] = {
    # paths
    "index leads up": early(traverse, "shards must be"),
    "index leads to the root": early(absolute, "shards must be"),
    "index lists no text": early(
        lambda f: edit_index(f, lambda m: m.update({min(m): 3})), "shards must be"
    ),
    "shard is a link": early(link_outside("model-00001*"), "leaves the folder"),
    "shard is a device": early(link_to_device, "leaves the folder"),
    "shard is a pipe": early(pipe, "is not a regular file"),
    "shard is a folder": early(folder_as_shard, "is not a regular file"),
    "config is a link": early(link_outside("config.json"), "leaves the folder"),
    "tokenizer is a link": early(link_outside("tokenizer.json"), "leaves the folder"),
    "licence is a link": early(link_outside("LICENSE"), "leaves the folder"),
    "hub name with dots": Case(
        lambda folder: None, DataError, "there is no folder someone/..", model="someone/.."
    ),
    # safetensors
    "truncated": early(truncate, "not a usable safetensors file"),
    "header of 2^62 bytes": early(endless_header, "not a usable safetensors file"),
    "pickle as shard": early(
        lambda f: first_shard(f).write_bytes(b"\x80\x02cos\nsystem\n" * 100),
        "not a usable safetensors file",
    ),
    "duplicate header key": early(duplicate_header_key, "'a' appears twice"),
    "overlap": early(with_header(shift(-4)), "not a usable safetensors file"),
    "hole": early(with_header(shift(4)), "not a usable safetensors file"),
    "negative size": early(with_header(negative_size), "not a usable safetensors file"),
    "1e5 empty tensors": early(with_header(empty_tensors("{}", 10**5)), "with a header of"),
    "5e3 empty layers": late(
        with_header(empty_tensors("model.decoder.layers.9{}.fc1.weight", 5000)),
        "4997 more",
    ),
    "shard missing": early(lambda f: first_shard(f).unlink(), "is missing"),
    "tensor missing in shard": early(remove_tensor, "which the index lists"),
    "tensor missing": late(unlisted_tensor_gone, "lacks tensors of the model"),
    "tensor in two shards": early(
        tensor_in_two_shards, "is in model-00001.* and in model-00002"
    ),
    "weight NaN": late(
        weight_with(float("nan")),
        r"'model.decoder.layers.1.fc2.weight' of .* nan at \[3, 5\]",
    ),
    "weight infinite": late(weight_with(float("inf")), r"holds inf at \[3, 5\]"),
    "pickles": early(pickles_only, r"only pickled weights \(pytorch_model.bin\)"),
    "no weights": early(no_weights, "choose a safetensors model"),
    # index and configuration
    "duplicate key": early(duplicate_key, "'model_type' appears twice"),
    "duplicate index key": early(
        write(INDEX, b'{"weight_map": {"a": "x", "a": "y"}}'), "'a' appears twice"
    ),
    "index without map": early(write(INDEX, b"{}"), "has no weight_map"),
    "empty map": early(write(INDEX, b'{"weight_map": {}}'), "has no weight_map"),
    "map is a list": early(write(INDEX, b'{"weight_map": [1]}'), "has no weight_map"),
    "config no JSON": early(write("config.json", b"{garbage"), "not usable JSON"),
    "config no text": early(write("config.json", b"\xff\xfe{}"), "not usable JSON"),
    "config NaN": early(write("config.json", b'{"model_type": NaN}'), "the value NaN"),
    "config too deep": early(write("config.json", b"[" * 10**5), "not usable JSON"),
    "config a list": early(write("config.json", b"[1]"), "must hold a JSON object"),
    "config empty": early(write("config.json", b"{}"), "names no model_type"),
    "no config": early(remove("config.json"), "not a model folder"),
    "redirected weights": early(
        config_with(transformers_weights="x.safetensors"), "redirects"
    ),
    "quantised": Case(
        config_with(quantization_config={"quant_method": "gptq"}),
        UnsupportedModelError,
        "quantised: prune the original",
    ),
    "attention of the hub": Case(
        config_with(text_config={"_attn_implementation": "evil/kernel"}),
        UnsupportedModelError,
        "code from the hub",
    ),
    "distributed": Case(
        write("shard-00000-model-00001-of-00001.safetensors", b""),
        UnsupportedModelError,
        "distributed checkpoint",
    ),
    # configuration against weights
    "layer too many": late(config_with(num_hidden_layers=3), "lacks .*layers.2.*more"),
    "layer too few": late(config_with(num_hidden_layers=1), "layers that config.json"),
    "200 layers": late(config_with(num_hidden_layers=200), "asks for 200 layers"),
    "no layers": late(config_with(num_hidden_layers=0), "asks for 0 layers"),
    "huge vocabulary": late(config_with(vocab_size=10**12), "embed_tokens.* has shape"),
    "other width": late(config_with(ffn_dim=25), r"fc1.* has shape \(24, 16\)"),
    "negative width": late(config_with(hidden_size=-1), "config.json is invalid"),
    "width a text": late(config_with(hidden_size="16"), "config.json is invalid"),
    "width infinite": late(config_with(hidden_size=float("inf")), "config.json is invalid"),
    "layers a text": late(config_with(num_hidden_layers="2"), "config.json is invalid"),
    "text part a number": late(config_with(text_config=3), "config.json is invalid"),
    "unknown type": Case(
        config_with(model_type="nope"),
        UnsupportedModelError,
        "does not know it",
        early=False,
    ),
    "foreign code": Case(foreign_code, UnsupportedModelError, "never run", early=False),
    "no language model": Case(
        config_with(model_type="vit"),
        UnsupportedModelError,
        "is not a causal language model",
        early=False,
    ),
    # tokenizer
    "tokenizer damaged": late(
        write("tokenizer.json", b"{"), "the tokenizer in .* cannot be"
    ),
    "tokenizer foreign": late(foreign_tokenizer, "the tokenizer in .* cannot be"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OPT in shards; tests work on copies."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))["opt"]


@pytest.fixture
def workshop(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder with a model that a test may damage, and a text; the hub is far."""
    shutil.copytree(good, tmp_path / "opt")
    (tmp_path / "text.txt").write_text(tiny_text())
    monkeypatch.chdir(tmp_path)

    def download(*_: Any, **__: Any) -> str:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return tmp_path


def everything(folder: Path) -> dict[str, bytes | str]:
    """Content of all files, and what else there is."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        if path.is_file() and path.resolve().is_relative_to(folder)
        else oct(path.lstat().st_mode)
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("case", REFUSED.values(), ids=list(REFUSED))
@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_refused_in_one_line(
    command: Sequence[str], case: Case, workshop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    case.damage(workshop / "opt")
    before = everything(workshop)
    start = time.process_time()
    code = run([case.model if word == "MODEL" else word for word in command])
    seconds = time.process_time() - start
    printed = capfd.readouterr()
    assert code == case.error.exit_code
    assert printed.out == ""
    *steps, error = printed.err.splitlines()  # steps that last have a line
    assert not any(step.startswith("layerwise: ") for step in steps), printed.err
    assert error.startswith("layerwise: "), printed.err
    assert len(error) < 500
    with pytest.raises(case.error, match=case.match):
        raise case.error(error)
    assert everything(workshop) == before
    assert seconds < SECONDS


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, case in REFUSED.items() if case.early],
)
def test_refused_before_transformers_sees_it(case: Case, workshop: Path) -> None:
    case.damage(workshop / "opt")
    with pytest.raises(case.error, match=case.match):
        Checkpoint.open(case.model)


def test_good_folder_is_not_refused(workshop: Path) -> None:
    for command in COMMANDS.values():
        assert run(["opt" if word == "MODEL" else word for word in command]) == 0

"""Checkpoints: every damaged or hostile folder is refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.errors import DataError, LayerwiseError, UnsupportedModelError
from layerwise.run.storage import Checkpoint
from tests.checkpoints import INDEX, edit_json, write_checkpoints


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pristine folders; tests that write work on copies."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def opt(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["opt"], tmp_path / "opt"))


# --- damage --------------------------------------------------------------------------


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def traverse(folder: Path) -> None:
    shard = first_shard(folder)
    secret = folder.parent / "secret"
    secret.mkdir()
    shutil.move(shard, secret / shard.name)
    edit_index(folder, lambda m: _redirect(m, shard.name, f"../secret/{shard.name}"))


def absolute(folder: Path) -> None:
    shard = first_shard(folder)
    edit_index(folder, lambda m: _redirect(m, shard.name, str(shard)))


def _redirect(weight_map: dict[str, str], old: str, new: str) -> None:
    weight_map.update({n: new for n, shard in weight_map.items() if shard == old})


def link_outside(folder: Path) -> None:
    shard = first_shard(folder)
    outside = shard.rename(folder.parent / "outside.safetensors")
    shard.symlink_to(outside)


def link_config_outside(folder: Path) -> None:
    outside = (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to(outside)


def link_licence_outside(folder: Path) -> None:
    outside = (folder / "LICENSE").rename(folder.parent / "LICENSE")
    (folder / "LICENSE").symlink_to(outside)


def truncate(folder: Path) -> None:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-7])


def huge_header(folder: Path) -> None:
    data = first_shard(folder).read_bytes()
    first_shard(folder).write_bytes((2**62).to_bytes(8, "little") + data[8:])


def garbage_shard(folder: Path) -> None:
    first_shard(folder).write_bytes(b"\x80\x02cos\nsystem\n" * 100)


def duplicate_header_key(folder: Path) -> None:
    entry = b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    header = b"{" + entry + b"," + entry + b"}"
    header += b" " * (-len(header) % 8)
    first_shard(folder).write_bytes(len(header).to_bytes(8, "little") + header + b"1")


def remove_tensor(folder: Path) -> None:
    state = load_file(first_shard(folder))
    state.pop(min(state))
    save_file(state, first_shard(folder), metadata={"format": "pt"})


def tensor_in_two_shards(folder: Path) -> None:
    shards = sorted(folder.glob("model-*.safetensors"))
    state = load_file(shards[0])
    extra = dict(sorted(load_file(shards[1]).items())[:1])
    save_file(state | extra, shards[0], metadata={"format": "pt"})


def pickles_only(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()


def duplicate_key(folder: Path) -> None:
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(text + ', "model_type": "llama"}')


def duplicate_index_key(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')


def config_with(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **values)


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


REFUSED_BEFORE_LOADING = [
    (traverse, DataError, "shards must be"),
    (absolute, DataError, "shards must be"),
    (link_outside, DataError, "leaves the folder"),
    (link_config_outside, DataError, "leaves the folder"),
    (link_licence_outside, DataError, "leaves the folder"),
    (truncate, DataError, "not a usable safetensors file"),
    (huge_header, DataError, "not a usable safetensors file"),
    (garbage_shard, DataError, "not a usable safetensors file"),
    (duplicate_header_key, DataError, "'a' appears twice"),
    (lambda folder: first_shard(folder).unlink(), DataError, "is missing"),
    (remove_tensor, DataError, "which the index promises"),
    (tensor_in_two_shards, DataError, "is in model-00001.* and in model-00002"),
    (pickles_only, DataError, r"pickled weights only \(pytorch_model.bin\)"),
    (no_weights, DataError, "choose a safetensors model"),
    (duplicate_key, DataError, "'model_type' appears twice"),
    (duplicate_index_key, DataError, "'a' appears twice"),
    (write("config.json", b"{garbage"), DataError, "not usable JSON"),
    (write("config.json", b"\xff\xfe{}"), DataError, "not usable JSON"),
    (write("config.json", b'{"model_type": NaN}'), DataError, "the value NaN"),
    (write("config.json", b"[" * 10**5), DataError, "not usable JSON"),
    (write("config.json", b"[1]"), DataError, "must hold a JSON object"),
    (write("config.json", b"{}"), DataError, "names no model_type"),
    (remove("config.json"), DataError, "not a model folder"),
    (write(INDEX, b"{}"), DataError, "has no weight_map"),
    (config_with(transformers_weights="x.safetensors"), DataError, "redirects"),
    (
        config_with(quantization_config={"quant_method": "gptq"}),
        UnsupportedModelError,
        "quantised",
    ),
    (
        config_with(text_config={"_attn_implementation": "evil/kernel"}),
        UnsupportedModelError,
        "code from the hub",
    ),
    (
        write("shard-00000-model-00001-of-00001.safetensors", b""),
        UnsupportedModelError,
        "distributed checkpoint",
    ),
]

REFUSED_WHILE_LOADING = [
    (config_with(num_hidden_layers=3), DataError, "lacks tensors .*layers.2.*more"),
    (config_with(num_hidden_layers=1), DataError, "layers that config.json does not"),
    (config_with(num_hidden_layers=200), DataError, "asks for 200 layers"),
    (config_with(vocab_size=10**12), DataError, "embed_tokens.* has shape"),
    (config_with(ffn_dim=25), DataError, r"fc1.* has shape \(24, 16\)"),
    (config_with(hidden_size=-1), DataError, "config.json is invalid"),
    (config_with(hidden_size="16"), DataError, "config.json is invalid"),
    (config_with(model_type="nope"), UnsupportedModelError, "does not know it"),
    (
        config_with(model_type="nope", auto_map={"AutoConfig": "evil.Config"}),
        UnsupportedModelError,
        "never run",
    ),
    (config_with(model_type="vit"), UnsupportedModelError, "not a causal language"),
]


def case_id(case: tuple[Any, ...]) -> str:
    return str(case[2])


def refusal(call: Callable[[], object], error: type[Exception], match: str) -> None:
    """The call fails as declared, with one line that is not too long."""
    with pytest.raises(error, match=match) as caught:
        call()
    assert isinstance(caught.value, LayerwiseError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", REFUSED_BEFORE_LOADING, ids=case_id)
def test_refused_before_transformers_sees_it(case: Any, opt: Path) -> None:
    damage, error, match = case
    damage(opt)
    refusal(lambda: Checkpoint.open(opt), error, match)


@pytest.mark.parametrize("case", REFUSED_WHILE_LOADING, ids=case_id)
def test_refused_while_loading(case: Any, opt: Path) -> None:
    damage, error, match = case
    damage(opt)
    checkpoint = Checkpoint.open(opt)
    refusal(checkpoint.load_model, error, match)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(opt: Path, value: float) -> None:
    name = "model.decoder.layers.1.fc2.weight"
    shard = opt / Checkpoint.open(opt).weight_map[name]
    state = load_file(shard)
    state[name][3, 5] = value
    state[name][4, 0] = value
    save_file(state, shard, metadata={"format": "pt"})
    match = rf"'{name}' .* holds {value} at \[3, 5\]"
    refusal(Checkpoint.open(opt).load_model, DataError, match)

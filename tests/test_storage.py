"""Checkpoints: identical copies, and every damaged or hostile folder refused."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from layerwise.errors import (
    DataError,
    LayerwiseError,
    UnsupportedModelError,
    UsageError,
)
from layerwise.run.atomic import remove_temporaries
from layerwise.run.shard import read_header, rewrite_shard
from layerwise.run.storage import (
    Checkpoint,
    atomic_write,
    checkpoint_names,
    pack_mask,
    unpack_mask,
    write_checkpoint,
)

VOCABULARY = 300
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(["prune the weights of a small model"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained)


def tiny_llama(tied: bool) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def tiny_opt() -> Any:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OPTForCausalLM(config)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> dict[str, Path]:
    """Pristine folders; tests that write work on copies."""
    root = tmp_path_factory.mktemp("checkpoints")
    opt = tiny_opt().to(torch.float32)
    opt.save_pretrained(root / "opt", max_shard_size="12KB")
    tokenizer.save_pretrained(root / "opt")
    (root / "opt" / "LICENSE").write_text("Apache-2.0")
    (root / "opt" / "README.md").write_text("# the original")
    opt.save_pretrained(root / "single")
    tiny_llama(tied=True).to(torch.bfloat16).save_pretrained(root / "llama-tied")
    tiny_llama(tied=False).to(torch.float32).save_pretrained(root / "llama")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def opt(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["opt"], tmp_path / "opt"))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


# --- reading -------------------------------------------------------------------------


def test_opened_checkpoint_describes_every_tensor(folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(folders["opt"])
    state = tiny_opt().to(torch.float32).state_dict()
    state.pop("lm_head.weight")  # tied, stored once
    assert len(checkpoint.shards) > 1
    assert list(checkpoint.weight_map) == sorted(state)
    streamed = dict(checkpoint.tensors())
    assert streamed.keys() == state.keys()
    for name, entry in checkpoint.entries().items():
        assert torch.equal(streamed[name], state[name])
        assert (entry.dtype, entry.shape) == ("F32", tuple(state[name].shape))
        assert entry.n_bytes == state[name].nbytes


def test_stream_of_chosen_tensors(folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(folders["opt"])
    wanted = [min(checkpoint.weight_map), max(checkpoint.weight_map)]
    assert {name for name, _ in checkpoint.tensors(wanted)} == set(wanted)
    with pytest.raises(UsageError, match="no tensor 'nothing'"):
        list(checkpoint.tensors(["nothing"]))


@pytest.mark.parametrize("name", ["opt", "single", "llama", "llama-tied"])
def test_loaded_model_is_the_saved_one(folders: dict[str, Path], name: str) -> None:
    checkpoint = Checkpoint.open(folders[name])
    model = checkpoint.load_model()
    assert not model.training
    names = checkpoint_names(model, checkpoint)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert names.keys() == parameters.keys()
    stored = dict(checkpoint.tensors())
    assert set(names.values()) == stored.keys()
    for parameter, tensor in names.items():
        assert parameters[parameter].dtype == stored[tensor].dtype
        assert torch.equal(parameters[parameter], stored[tensor])


def test_names_differ_by_the_prefix_of_the_base_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["single"], tmp_path, dirs_exist_ok=True)
    shard = tmp_path / "model.safetensors"
    state = {n.removeprefix("model."): t for n, t in load_file(shard).items()}
    save_file(state, shard, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    names = checkpoint_names(checkpoint.load_model(), checkpoint)
    assert names["model.decoder.layers.1.fc1.weight"] == "decoder.layers.1.fc1.weight"
    assert names["lm_head.weight"] == "decoder.embed_tokens.weight"
    longer = Checkpoint.open(folders["single"])
    names = checkpoint_names(longer.load_model().model, longer)
    assert names["decoder.layers.1.fc1.weight"] == "model.decoder.layers.1.fc1.weight"


@pytest.fixture(params=[True, False], ids=["hub bars", "no hub bars"])
def loud_transformers(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ...]]:
    """Everything on that loading has to switch off; yields that state."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    if not request.param:
        disable_progress_bars()
    yield loudness()
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    if not bars:
        logging.disable_progress_bar()


def loudness() -> tuple[Any, ...]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    return (logging.get_verbosity(), *bars)


def test_loading_is_silent_and_leaves_global_state_alone(
    opt: Path, capfd: pytest.CaptureFixture[str], loud_transformers: tuple[Any, ...]
) -> None:
    seed = torch.get_rng_state()
    edit_json(opt / "config.json", num_hidden_layers=3)  # worth a long report
    with pytest.raises(DataError):
        Checkpoint.open(opt).load_model()
    edit_json(opt / "config.json", num_hidden_layers=2)
    Checkpoint.open(opt).load_model()
    assert torch.equal(seed, torch.get_rng_state())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert loudness() == loud_transformers


def test_tokenizer_is_loaded_or_absent_or_refused(
    folders: dict[str, Path], opt: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "prune a model"
    loaded = Checkpoint.open(opt).load_tokenizer()
    assert loaded is not None
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert Checkpoint.open(folders["llama"]).load_tokenizer() is None
    (opt / "tokenizer.json").write_text("{garbage")
    with pytest.raises(DataError, match=r"tokenizer in .* cannot be loaded"):
        Checkpoint.open(opt).load_tokenizer()


# --- refusing ------------------------------------------------------------------------


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


def test_stale_index_beside_a_single_file_is_ignored(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["single"], tmp_path / "stale"))
    (folder / INDEX).write_text('{"weight_map": {"a": "../evil.safetensors"}}')
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shards == ["model.safetensors"]
    assert INDEX not in checkpoint.side_files()
    checkpoint.load_model()


def test_links_of_the_hub_cache_are_followed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    repository = tmp_path / "models--me--opt"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = Path(shutil.copytree(folders["opt"], repository / "blobs"))
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    Checkpoint.open(snapshot).load_model()
    blob = (blobs / "config.json").rename(tmp_path / "config.json")
    (blobs / "config.json").symlink_to(blob)
    with pytest.raises(DataError, match="leaves the folder"):
        Checkpoint.open(snapshot)


def test_hub_is_asked_for_names_only(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert not any("bin" in pattern for pattern in allow_patterns)
        asked.append(name)
        if name == "me/absent":
            message = "404\nnot found"
            raise OSError(message)
        return str(folders["opt"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Checkpoint.open("me/opt").path == folders["opt"]
    with pytest.raises(DataError, match=r"no folder me/absent.*does not serve it: 404"):
        Checkpoint.open("me/absent")
    assert asked == ["me/opt", "me/absent"]
    for path in ("/no/such", "./no", "a/b/c", "../up", "a/..", tmp_path / "no"):
        with pytest.raises(DataError, match="there is no folder"):
            Checkpoint.open(path)
    with pytest.raises(DataError, match="is a file"):
        Checkpoint.open(folders["opt"] / "config.json")
    assert asked == ["me/opt", "me/absent"]


# --- writing -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["opt", "single", "llama", "llama-tied"])
def test_copy_without_replacement_is_identical(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    source = Checkpoint.open(folders[name])
    write_checkpoint(source, tmp_path, {})
    written = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")}
    expected = {path.name for path in folders[name].iterdir()} - {"README.md"}
    assert written == expected
    assert Checkpoint.open(tmp_path).sha256() == source.sha256()
    assert source.sha256().keys() == expected


@pytest.mark.parametrize("name", ["opt", "llama-tied"])
def test_copy_differs_in_the_replaced_tensors_alone(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    source = Checkpoint.open(folders[name])
    model = source.load_model()
    names = checkpoint_names(model, source)
    replaced = {
        names[parameter]: torch.where(value > 0, value, 0).T.contiguous().T
        for parameter, value in model.named_parameters()
        if value.dim() == 2 and "layers.1" in parameter
    }
    assert replaced
    write_checkpoint(source, tmp_path, replaced)
    output = Checkpoint.open(tmp_path)
    for tensor, before in source.tensors():
        after = dict(output.tensors([tensor]))[tensor]
        assert torch.equal(after, replaced.get(tensor, before))
    for shard in source.shards:
        old, new = source.path / shard, tmp_path / shard
        header = read_header(old)
        assert read_header(new) == header
        assert old.stat().st_size == new.stat().st_size
    changed = {n for n, h in output.sha256().items() if h != source.sha256()[n]}
    assert changed == {source.weight_map[tensor] for tensor in replaced}
    output.load_model()


def test_missing_format_is_added(tmp_path: Path) -> None:
    state = {"ä": torch.arange(3), "b": torch.zeros(0, 2), "c": torch.tensor(True)}
    save_file(state, tmp_path / "old")
    assert read_header(tmp_path / "old").metadata == {}
    rewrite_shard(tmp_path / "old", tmp_path / "new", {"c": torch.tensor(False)})
    header = read_header(tmp_path / "new")
    assert header.metadata == {"format": "pt"}
    assert header.data_start % 8 == 0
    loaded = load_file(tmp_path / "new")
    assert loaded.keys() == state.keys()
    assert torch.equal(loaded["ä"], state["ä"])
    assert not loaded["c"]
    assert loaded["b"].shape == (0, 2)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(24, 16, dtype=torch.float16), "F32.*replacement F16"),
        (torch.zeros(16, 24), r"replacement F32 \(16, 24\)"),
        (None, "no tensor 'nothing'"),
    ],
)
def test_replacement_must_fit(
    folders: dict[str, Path], tmp_path: Path, tensor: torch.Tensor | None, match: str
) -> None:
    name = "nothing" if tensor is None else "model.decoder.layers.0.fc1.weight"
    new = torch.zeros(1) if tensor is None else tensor
    new = new if new.dtype == torch.float16 else new.float()
    with pytest.raises(UsageError, match=match):
        write_checkpoint(Checkpoint.open(folders["opt"]), tmp_path, {name: new})
    assert list(tmp_path.iterdir()) == []


def test_output_folder_must_be_free(opt: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(opt)
    output = tmp_path / "output"
    with pytest.raises(UsageError, match="does not exist"):
        write_checkpoint(source, output, {})
    with pytest.raises(UsageError, match="is the source"):
        write_checkpoint(source, opt, {}, overwrite=True)
    output.mkdir()
    (output / "config.json").write_text("mine")
    with pytest.raises(UsageError, match=r"already holds config\.json"):
        write_checkpoint(source, output, {})
    assert (output / "config.json").read_text() == "mine"
    write_checkpoint(source, output, {}, overwrite=True)
    assert Checkpoint.open(output).sha256() == source.sha256()


def test_full_disk_is_noticed_before_writing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"needs \d+ bytes but its disk has 1000"):
        write_checkpoint(Checkpoint.open(folders["opt"]), tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_config_is_written_last(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    replace = Path.replace

    def record(self: Path, target: Path) -> Path:
        names.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", record)
    source = Checkpoint.open(folders["opt"])
    write_checkpoint(source, tmp_path, {})
    assert names[: len(source.shards)] == source.shards
    assert names[-1] == "config.json"


# --- atomic files --------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if step == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    data = fail if step == "write" else b"new content"
    match = "No space left on device; free" if step == "write" else "11 bytes needed"
    with pytest.raises(DataError, match=match) as caught:
        atomic_write(path, data)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def interrupt(stream: Any) -> None:
        stream.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, interrupt)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        folder = os.fstat(descriptor).st_ino == tmp_path.stat().st_ino
        events.append("flush folder" if folder else "flush file")
        assert folder or os.fstat(descriptor).st_size == len(b"content")
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        assert self.read_bytes() == b"content"
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    atomic_write(tmp_path / "file", lambda stream: stream.write(b"content"))
    assert events == ["flush file", "rename", "flush folder"]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".file.123.tmp").write_bytes(b"half")
    (tmp_path / "kept.tmp").write_bytes(b"not ours")
    remove_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.tmp"]


# --- masks ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (8,), (3, 5), (2, 3, 4)])
def test_mask_survives_packing(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_mask(mask.T.contiguous().T if mask.dim() == 2 else mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == (mask.numel() + 7) // 8
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_first_entry_is_the_lowest_bit() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = True
    assert pack_mask(mask).tolist() == [1, 1]


def test_mask_of_another_shape_is_refused() -> None:
    packed = pack_mask(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(DataError, match=r"needs uint8 of shape \(1,\)"):
        unpack_mask(packed, (2, 4))
    with pytest.raises(DataError, match="bits set in its padding"):
        unpack_mask(torch.tensor([255], dtype=torch.uint8), (7,))
    with pytest.raises(DataError, match="needs uint8 of shape"):
        unpack_mask(packed.to(torch.int32), (3, 3))
    with pytest.raises(UsageError, match="must be bool"):
        pack_mask(torch.ones(3))

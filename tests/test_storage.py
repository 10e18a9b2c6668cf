"""Checkpoints: where they come from, what is read, and copies that are identical."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints.shard import read_header, rewrite_shard
from layerwise.run.checkpoints.storage import Checkpoint, write_checkpoint
from layerwise.run.models.accounts import checkpoint_names
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import load_model
from tests.support.checkpoints import INDEX, edit_json, tiny_opt, write_checkpoints
from tests.support.models import tiny_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pristine folders; tests that write work on copies."""
    return write_checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def opt(folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folders["opt"], tmp_path / "opt"))


# --- reading -------------------------------------------------------------------------


def test_opened_checkpoint_describes_every_tensor(folders: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(folders["opt"])
    state = tiny_opt().state_dict()
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
    model = load_model(checkpoint)
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
    names = checkpoint_names(load_model(checkpoint), checkpoint)
    assert names["model.decoder.layers.1.fc1.weight"] == "decoder.layers.1.fc1.weight"
    assert names["lm_head.weight"] == "decoder.embed_tokens.weight"
    longer = Checkpoint.open(folders["single"])
    names = checkpoint_names(load_model(longer).model, longer)
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
        load_model(Checkpoint.open(opt))
    edit_json(opt / "config.json", num_hidden_layers=2)
    load_model(Checkpoint.open(opt))
    assert torch.equal(seed, torch.get_rng_state())
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert loudness() == loud_transformers


def test_tokenizer_is_loaded_or_absent_or_refused(
    folders: dict[str, Path], opt: Path
) -> None:
    text = "prune a model"
    loaded = load_tokenizer(Checkpoint.open(opt))
    assert loaded is not None
    assert loaded(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert load_tokenizer(Checkpoint.open(folders["llama"])) is None
    (opt / "tokenizer.json").write_text("{garbage")
    with pytest.raises(DataError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(Checkpoint.open(opt))


# --- where it comes from -------------------------------------------------------------


def test_stale_index_beside_a_single_file_is_ignored(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["single"], tmp_path / "stale"))
    (folder / INDEX).write_text('{"weight_map": {"a": "../evil.safetensors"}}')
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.shards == ["model.safetensors"]
    assert INDEX not in checkpoint.side_files()
    load_model(checkpoint)


def test_links_of_the_hub_cache_are_followed(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    repository = tmp_path / "models--me--opt"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = Path(shutil.copytree(folders["opt"], repository / "blobs"))
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("../../blobs") / blob.name)
    load_model(Checkpoint.open(snapshot))
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
    model = load_model(source)
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
    load_model(output)


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
        (torch.zeros(24, 16, dtype=torch.float16), "F32.*replacement is F16"),
        (torch.zeros(16, 24), r"replacement is F32 \(16, 24\)"),
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

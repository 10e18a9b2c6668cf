"""A streamed model gives the bytes of the model in memory, and has one block at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.errors import DataError
from layerwise.run import capacity, prune
from layerwise.run.activations.hidden_store import HiddenStore, choose_store
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model, open_model
from layerwise.run.models.residency import Streamed
from layerwise.run.pipeline.parallel import Workers
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.run.prune import prune_model
from tests.support.folders import files_of
from tests.support.models import (
    FAMILIES,
    VOCABULARY,
    mixture_of_experts,
    random_tokens,
    save_checkpoint,
    tiny_model,
)

TOKENS = random_tokens(6, 12)


def pruned(source: Path, out: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {"method": "wanda", "sparsity": 0.5, "calibration": TOKENS}
    arguments |= {"n_sequences": 6, "sequence_length": 12, "output_dir": out}
    return prune_model(source, **{**arguments, **options})


@contextmanager
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(ZeroWeights, "needs_whole_model", True)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_buffers_are_those_of_the_loaded_model(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(family, dtype=dtype, tied=family == "opt")
    checkpoint = Checkpoint.open(save_checkpoint(tmp_path / "m", model, tokenizer=False))
    streamed = Streamed.open(checkpoint)
    assert streamed is not None
    loaded: Any = load_model(checkpoint)
    assert all(p.is_meta for p in streamed.model.parameters())
    for name, buffer in loaded.named_buffers():
        assert torch.equal(streamed.model.get_buffer(name), buffer), name
    seen: list[str] = []

    def compare(block: nn.Module, args: Any) -> None:
        (name,) = (n for n, m in streamed.model.named_modules() if m is block)
        seen.append(name)
        for own, parameter in block.named_parameters():
            other = loaded.get_parameter(f"{name}.{own}")
            assert parameter.dtype == other.dtype
            assert torch.equal(parameter, other), own

    with streamed.whole(), torch.no_grad():
        blocks = [m for m in streamed.model.modules() if id(m) in streamed._units]
        for block in blocks:
            block.register_forward_pre_hook(compare)
        found = streamed.model(TOKENS, use_cache=False).logits
        assert torch.equal(found, loaded(TOKENS, use_cache=False).logits)
    assert len(seen) == len(blocks) == 2
    assert all(p.is_meta for p in streamed.model.parameters())


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
@pytest.mark.parametrize("family", ["opt", "llama", "mamba", "gpt2"])
def test_streamed_run_writes_the_same_bytes(
    family: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    source = save_checkpoint(tmp_path / "m", model, max_shard_size="9KB")
    options = {"error_correction": mode, "method": "wanda+least-squares"}
    report = pruned(source, tmp_path / "a", **options)
    with in_memory(monkeypatch):
        whole = pruned(source, tmp_path / "b", **options)
    pruned(source, tmp_path / "c", activations="disk", **options)
    assert report.opened is None
    assert whole.opened is not None
    expected = files_of(tmp_path / "b")
    assert files_of(tmp_path / "a") == expected
    assert files_of(tmp_path / "c") == expected
    for name, value in whole.model.state_dict().items():
        assert torch.equal(report.model.state_dict()[name], value)
    assert list(report.masks) == list(whole.masks)
    assert all(torch.equal(mask, whole.masks[name]) for name, mask in report.masks.items())


def test_one_block_is_there_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint(tmp_path / "m", tiny_model("llama", layers=4))
    opened: list[Any] = []
    present: list[set[str]] = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        opened.append(open_model(*args, **kwargs))
        return opened[-1]

    class Watch:
        def on_start(self, n_layers: int) -> None:
            pass

        def on_layer(self, record: Any) -> None:
            parameters = opened[0].model.named_parameters()
            here = {name for name, parameter in parameters if not parameter.is_meta}
            present.append({name[: len("model.layers.0")] for name in here})

        def on_finish(self, report: Any) -> None:
            assert all(p.is_meta for p in opened[0].model.parameters())

    monkeypatch.setattr(prune, "open_model", remember)
    pruned(source, tmp_path / "out", callbacks=[Watch()])
    assert present == [{f"model.layers.{index}"} for index in range(4) for _ in range(7)]


def test_fused_experts_are_left_to_transformers(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "m", mixture_of_experts(), tokenizer=False)
    assert Streamed.open(Checkpoint.open(source)) is None


def test_native_folders_can_be_pruned_again(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "m", tiny_model("llama"))
    smaller = {
        "method": "columns",
        "sparsity": 0.3,
        "pattern": "heads",
        "format": "native",
        "multiple": 1,
    }
    pruned(source, tmp_path / "native", **smaller)
    notes: list[str] = []

    class Notes:
        def on_note(self, text: str) -> None:
            notes.append(text)

        def on_start(self, n_layers: int) -> None: ...

        def on_layer(self, record: Any) -> None: ...

        def on_finish(self, report: Any) -> None: ...

    report = pruned(tmp_path / "native", tmp_path / "out", callbacks=[Notes()])
    assert 0.4 < report.sparsity <= 0.5  # odd widths are rounded down
    assert prune.WHOLE in notes


def test_smaller_models_and_gradients_are_not_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint(tmp_path / "m", tiny_model("llama"))

    def refuse(checkpoint: Checkpoint) -> None:
        raise AssertionError

    monkeypatch.setattr(Streamed, "open", refuse)
    assert pruned(source, tmp_path / "a", method="gblm").opened is not None
    report = pruned(source, tmp_path / "b", method="fasp", sparsity=0.2)
    assert report.opened is not None


def test_a_disk_that_is_too_small_is_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint(tmp_path / "m", tiny_model("llama"), tokenizer=False)
    monkeypatch.setattr(capacity, "free_disk", lambda path: 1000)
    monkeypatch.setattr(Workers, "prune", None)
    with pytest.raises(DataError, match=r"needs \d+ bytes but its disk has 1000"):
        pruned(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# --- hidden states -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_on_disk_are_those_that_were_kept(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    batches = [torch.randn(2, 3, VOCABULARY).to(dtype) for _ in range(4)]
    kept = HiddenStore(tmp_path).keep(iter(batches))
    assert all(map(torch.equal, kept, batches))
    assert [batch.dtype for batch in kept] == [dtype] * 4
    assert list(tmp_path.iterdir()) == []  # the files have no names any more
    assert kept[0].data_ptr() != batches[0].data_ptr()


def test_store_goes_to_the_disk_where_memory_is_short(tmp_path: Path) -> None:
    def is_on_disk(asked: str, needed: int, free: int | None) -> bool:
        return choose_store(asked, tmp_path, needed, free)._folder is not None

    assert is_on_disk("disk", 1, 100)
    assert is_on_disk("auto", 26, 100)
    assert not is_on_disk("auto", 25, 100)
    assert not is_on_disk("auto", 26, None)
    assert not is_on_disk("memory", 26, 100)


def test_full_disk_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"16 bytes needed.*No space left"):
        HiddenStore(tmp_path).keep([torch.zeros(4)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": "tape"}, "one of auto, memory, disk"),
        ({"activations": "disk", "output_dir": None}, "output folder"),
    ],
)
def test_impossible_stores_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = save_checkpoint(tmp_path / "m", tiny_model("llama"))
    with pytest.raises(ValueError, match=message):
        pruned(source, tmp_path / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]

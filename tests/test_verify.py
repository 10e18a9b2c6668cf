"""verify: a good folder passes, and every kind of tampering is found and named."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from layerwise.cli import run
from layerwise.errors import DataError
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline.journal import Journal, read_masks
from layerwise.run.prune import prune_model
from tests.support.models import SHARD, edit_shard, save_checkpoint, tiny_model, tiny_text

PRUNED = "model.layers.1.mlp.up_proj.weight"
UNTOUCHED = "model.layers.0.input_layernorm.weight"
CLAIMS = {
    "complete": "a mask and a line of the log",
    "zeros": "exactly zero",
    "negative": "no zero of a pruned tensor is negative",
    "pattern": "every mask satisfies the pattern",
    "finite": "finite",
    "untouched": "other tensors have the bytes of the source",
    "shards": "files with tensors are as the run wrote them",
    "files": "other files are as the run wrote them",
    "opens": "stock transformers opens it",
}


def make(folder: Path, **options: Any) -> Path:
    model = tiny_model("llama", dtype=torch.bfloat16, tied=True)
    source = save_checkpoint(folder / "source", model)
    settings = {"sparsity": 0.5, "n_sequences": 4, "sequence_length": 12}
    arguments: dict[str, Any] = settings | {"output_dir": folder / "out"} | options
    prune_model(source, "wanda", calibration=[tiny_text()], **arguments)
    return folder / "out"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def out(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "out")


def broken_claims(folder: Path) -> list[str]:
    failed = [check.claim for check in verify(folder) if not check.holds]
    return [key for key, words in CLAIMS.items() if any(words in c for c in failed)]


def first(folder: Path, kept: bool) -> tuple[int, ...]:
    """Place of the first weight that was kept, or removed."""
    return tuple((read_masks(folder)[PRUNED] == kept).nonzero()[0].tolist())


# --- good folders ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": "2:4"},
        {"sparsity": None, "pattern": "1:8"},
        {"sparsity": 0.0},
        {"targets": "re:.*q_proj"},
    ],
    ids=str,
)
def test_good_folder_passes(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path, **options)
    checks = verify(folder)
    assert len(checks) == len(CLAIMS)
    assert all(any(words in check.claim for check in checks) for words in CLAIMS.values())
    assert broken_claims(folder) == []
    assert run(["verify", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("ok  ") == len(CLAIMS)
    assert "FAIL" not in printed


def test_group_of_the_layer_passes(tmp_path: Path) -> None:
    from layerwise.patterns import Unstructured

    folder = make(tmp_path, sparsity=None, pattern=Unstructured(0.3, "layer"))
    assert broken_claims(folder) == []


# --- tampering ---------------------------------------------------------------------------


def set_weight(value: float, *, kept: bool) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        place = first(folder, kept)

        def edit(tensors: dict[str, Tensor]) -> None:
            tensors[PRUNED][place] = value

        edit_shard(folder / SHARD, edit)

    return damage


def nan_in_another(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[UNTOUCHED][0] = torch.nan

    edit_shard(folder / SHARD, edit)


def flip_one_bit(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[UNTOUCHED].view(torch.int16)[3] ^= 1

    edit_shard(folder / SHARD, edit)


def remove_tensor(name: str) -> Callable[[Path], None]:
    return lambda folder: edit_shard(folder / SHARD, lambda tensors: tensors.pop(name))


def add_tensor(folder: Path) -> None:
    edit_shard(folder / SHARD, lambda tensors: tensors.update({"more": torch.ones(2)}))


def reshape_tensor(folder: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[PRUNED] = tensors[PRUNED][:-1].clone()

    edit_shard(folder / SHARD, edit)


def change_masks(edit: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        masks = dict(read_masks(folder))
        edit(masks)
        journal = Journal(folder.parent / "journal", {})
        journal.write_masks(masks)
        (made,) = journal.folder.rglob("masks.safetensors")
        shutil.copy(made, folder / "layerwise" / "masks.safetensors")

    return damage


def roll(masks: dict[str, Tensor]) -> None:
    masks[PRUNED] = masks[PRUNED].roll(1, dims=1)


def keep_everything(masks: dict[str, Tensor]) -> None:
    masks[PRUNED] = torch.ones_like(masks[PRUNED])


def other_shape(masks: dict[str, Tensor]) -> None:
    masks[PRUNED] = masks[PRUNED][:-1]


def change_log(edit: Callable[[list[str]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "layerwise" / "layers.jsonl"
        lines = path.read_text().splitlines()
        edit(lines)
        path.write_text("".join(line + "\n" for line in lines))

    return damage


def cut_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def edit_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return damage


def add_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def link_out(name: str) -> Callable[[Path], None]:
    """Put a link to the same bytes elsewhere in the place of a file."""

    def damage(folder: Path) -> None:
        shutil.move(folder / name, folder.parent / "moved")
        (folder / name).symlink_to(folder.parent / "moved")

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def change_manifest(**values: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        path = folder / "layerwise" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


LOG, GENERATION = "layerwise/layers.jsonl", "generation_config.json"
NOT_FINITE = {"finite", "opens"}
TAMPERING: Mapping[str, tuple[Callable[[Path], None], set[str], str]] = {
    "zero made nonzero": (set_weight(1e-3, kept=False), {"zeros"}, PRUNED),
    "zero made negative": (set_weight(-0.0, kept=False), {"negative"}, PRUNED),
    "weight made -0": (set_weight(-0.0, kept=True), {"negative"}, PRUNED),
    "pruned weight nan": (set_weight(torch.nan, kept=True), NOT_FINITE, PRUNED),
    "pruned weight inf": (set_weight(torch.inf, kept=True), NOT_FINITE, PRUNED),
    "one bit of another": (flip_one_bit, {"untouched"}, UNTOUCHED),
    "nan in another": (nan_in_another, {"untouched", "opens"}, UNTOUCHED),
    "pruned tensor missing": (remove_tensor(PRUNED), {"complete", "opens"}, PRUNED),
    "other tensor missing": (remove_tensor(UNTOUCHED), {"untouched", "opens"}, UNTOUCHED),
    "tensor too many": (add_tensor, {"untouched", "opens"}, "more"),
    "tensor reshaped": (reshape_tensor, {"complete", "opens"}, PRUNED),
    "mask shifted": (change_masks(roll), {"zeros"}, PRUNED),
    "mask of ones": (change_masks(keep_everything), {"pattern"}, PRUNED),
    "mask reshaped": (change_masks(other_shape), {"complete"}, PRUNED),
    "mask missing": (change_masks(lambda m: m.pop(PRUNED)), {"complete"}, PRUNED),
    "line missing": (change_log(list.pop), {"complete"}, "down_proj"),
    "line twice": (change_log(lambda li: li.append(li[0])), {"complete"}, "q_proj"),
    "layer cut off": (cut_config, {"opens"}, "model.layers.1"),
    "config": (edit_text("config.json", "1e-06", "1e-05"), set(), "config.json"),
    "tokenizer": (edit_text("tokenizer.json", "a", "b"), set(), "tokenizer.json"),
    "generation": (edit_text(GENERATION, "{", "{ "), set(), GENERATION),
    "no tokenizer": (remove("tokenizer.json"), set(), "tokenizer.json: is missing"),
    "template": (add_template, set(), "chat_template.jinja: the run did not write it"),
    "recipe": (edit_text("recipe.yaml", "seed: 0", "seed: 1"), set(), "recipe.yaml"),
    "card": (edit_text("README.md", "0.5", "0.6"), set(), "README.md"),
    "figure": (edit_text(LOG, '"relative_error": 0.', '"relative_error": 0.0'), set(), LOG),
    "rank": (edit_text(LOG, '"rank": 1', '"rank": 2'), set(), LOG),
    "pattern 3:7": (change_manifest(sparsity="3:7"), {"pattern"}, "layers.0.mlp"),
    "pattern 0.25": (change_manifest(sparsity="0.25"), {"pattern"}, "layers.0.mlp"),
    "log elsewhere": (link_out(LOG), {"files"}, f"{LOG}: is missing"),
}


@pytest.mark.parametrize(
    ("damage", "expected", "name"), TAMPERING.values(), ids=list(TAMPERING)
)
def test_tampering_is_found(
    out: Path,
    damage: Callable[[Path], None],
    expected: set[str],
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = contents(out)
    damage(out)
    after = contents(out)
    changed = {n for n in before.keys() | after if before.get(n) != after.get(n)}
    if SHARD in changed:
        expected = expected | {"shards"}
    if changed - {SHARD, "layerwise/manifest.json"}:
        expected = expected | {"files"}
    assert set(broken_claims(out)) == expected
    assert run(["verify", str(out)]) == 3
    printed = capsys.readouterr()
    assert printed.out.count("FAIL") == len(expected)
    assert name in printed.out
    assert printed.err.count("\n") == 1
    assert f"{len(expected)} of {len(CLAIMS)} checks failed" in printed.err


def strange_masks(folder: Path) -> None:
    save_file({"a": torch.zeros(2)}, folder / "layerwise" / "masks.safetensors")


def strange_shapes(folder: Path) -> None:
    path = folder / "layerwise" / "masks.safetensors"
    tensors = {"a": torch.zeros(2, dtype=torch.uint8)}
    save_file(tensors, path, metadata={"shapes": '{"a": null}'})


def deep_shapes(folder: Path) -> None:
    path = folder / "layerwise" / "masks.safetensors"
    save_file({"a": torch.zeros(2)}, path, metadata={"shapes": "[" * 100_000})


def many_shapes(folder: Path) -> None:
    path = folder / "layerwise" / "masks.safetensors"
    tensors = {"a": torch.zeros(2, dtype=torch.uint8)}
    save_file(tensors, path, metadata={"shapes": '{"a": [1e400, 2]}'})


def replace_by(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def padded_masks(folder: Path) -> None:
    path = folder / "layerwise" / "masks.safetensors"
    packed = torch.full((1,), 255, dtype=torch.uint8)
    save_file({"a": packed}, path, metadata={"shapes": '{"a": [1, 3]}'})


def overwrite(name: str, text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(text)


UNREADABLE: Mapping[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (remove("layerwise/manifest.json"), "it is not an output of layerwise"),
    "no masks": (remove("layerwise/masks.safetensors"), "it is not an output of layerwise"),
    "no log": (remove("layerwise/layers.jsonl"), "it is not an output of layerwise"),
    "no config": (remove("config.json"), "has no config.json"),
    "no weights": (remove(SHARD), f"has no {SHARD}"),
    "masks of another tool": (strange_masks, "masks.safetensors is damaged"),
    "masks without shapes": (strange_shapes, "masks.safetensors is damaged"),
    "masks with padding": (padded_masks, "bits set in its padding"),
    "masks cut": (overwrite("layerwise/masks.safetensors", "x"), "is damaged"),
    "log cut": (overwrite("layerwise/layers.jsonl", "{"), "layers.jsonl is damaged"),
    "manifest cut": (overwrite("layerwise/manifest.json", "{"), "not usable JSON"),
    "manifest of another": (overwrite("layerwise/manifest.json", "{}"), "is damaged"),
    "manifest extended": (change_manifest(more=1), "manifest.json is damaged"),
    "manifest without pattern": (change_manifest(sparsity="x"), "manifest.json is damaged"),
    "manifest with 1:10^5000": (
        change_manifest(sparsity="1:1" + "0" * 5000),
        "manifest.json is damaged",
    ),
    "manifest with 9:4": (change_manifest(sparsity="9:4"), "manifest.json is damaged"),
    "masks with deep shapes": (deep_shapes, "masks.safetensors is damaged"),
    "masks with many shapes": (many_shapes, "masks.safetensors is damaged"),
    "log deep": (overwrite(LOG, "[" * 100_000), "layers.jsonl is damaged"),
    "log of lists": (overwrite(LOG, "[1]\n"), "layers.jsonl is damaged"),
    "log not UTF-8": (
        lambda folder: (folder / LOG).write_bytes(b"\xff"),
        "layers.jsonl is damaged",
    ),
    "log a pipe": (replace_by(LOG, os.mkfifo), "is not a regular file"),
    "log a folder": (replace_by(LOG, os.mkdir), "is not a regular file"),
    "log a device": (replace_by(LOG, lambda p: p.symlink_to("/dev/zero")), "regular file"),
    "config a pipe": (replace_by("config.json", os.mkfifo), "is not a regular file"),
    "tokenizer a pipe": (replace_by("tokenizer.json", os.mkfifo), "not a regular file"),
    "template a pipe": (
        lambda folder: os.mkfifo(folder / "chat_template.jinja"),
        "is not a regular file",
    ),
    "shard cut": (overwrite(SHARD, "x"), "is not a usable safetensors file"),
}


@pytest.mark.parametrize(("damage", "expected"), UNREADABLE.values(), ids=list(UNREADABLE))
def test_folder_that_cannot_be_read(
    out: Path,
    damage: Callable[[Path], Any],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(out)
    with pytest.raises(DataError) as caught:
        verify(out)
    assert expected in str(caught.value)
    assert run(["verify", str(out)]) == 6
    error = capsys.readouterr().err
    assert error.startswith("layerwise: ")
    assert error.count("\n") == 1


def test_folder_of_a_dense_model(good: Path) -> None:
    with pytest.raises(DataError, match="it is not an output of layerwise"):
        verify(good.parent / "source")

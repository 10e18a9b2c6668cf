"""Blocks and states of an unfinished run that were changed: refused, never taken."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import DataError
from layerwise.grams.collect_grams import collect_grams
from layerwise.grams.solve_grams import solve_grams
from layerwise.recovery.retrain import retrain_model
from layerwise.run.checkpoints.hashes import bytes_sha256
from layerwise.run.prune import prune_model
from tests.support.folders import files_of
from tests.support.models import differing, random_tokens, save_checkpoint, tiny_model

DATA: Any = {"calibration": random_tokens(4, 12), "n_sequences": 4, "sequence_length": 12}
Content = tuple[dict[str, Tensor], dict[str, str]]


class Killed(BaseException):
    """Stands for the end of the process."""


class KillAt:
    """Callback that ends a run in the block with a number."""

    def __init__(self, block: int) -> None:
        self._part = f".{block}."

    def on_start(self, *counts: Any) -> None: ...

    def on_step(self, *values: Any) -> None: ...

    def on_layer(self, record: Any) -> None:
        if self._part in record.name:
            raise Killed

    on_unit = on_layer

    def on_finish(self, report: Any) -> None: ...


def prune(source: Path, out: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {"method": "magnitude", "sparsity": 0.5, **DATA}
    return prune_model(source, output_dir=out, **{**arguments, **options})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a model, its finished prune, and a prune that ended in block 2."""
    folder = tmp_path_factory.mktemp("tampered")
    source = save_checkpoint(folder / "model", tiny_model("llama", layers=3))
    prune(source, folder / "whole")
    for name, sparsity in (("half", 0.5), ("other", 0.25)):
        with pytest.raises(Killed):
            prune(source, folder / name, sparsity=sparsity, callbacks=[KillAt(2)])
    return folder


@pytest.fixture
def out(shop: Path, tmp_path: Path) -> Path:
    """Output whose unfinished run has the blocks 0 and 1."""
    shutil.copytree(shop / "half.partial", tmp_path / "out.partial")
    return tmp_path / "out"


def block(out: Path, index: int = 1) -> Path:
    blocks = out.with_name(out.name + ".partial") / "layerwise" / "blocks"
    (path,) = blocks.glob(f"{index:05d}-*.safetensors")
    return path


def rewritten(change: Callable[[Content], object]) -> Callable[[Path, Path], None]:
    """Damage that keeps the promise of the name: it has the hash of the new content."""

    def damage(out: Path, shop: Path) -> None:
        path = block(out)
        with safe_open(path, framework="pt") as file:
            content = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
        path.unlink()
        change(content)
        data = save(*content)
        path.with_name(f"00001-{bytes_sha256(data)[:16]}.safetensors").write_bytes(data)

    return damage


def set_figure(name: str, value: Any) -> Callable[[Content], object]:
    def change(content: Content) -> None:
        first, *rest = content[1]["records"].splitlines()
        line = json.dumps(json.loads(first) | {name: value})
        content[1]["records"] = "\n".join([line, *rest])

    return change


def rename(out: Path, shop: Path) -> None:
    path = block(out, 0)
    block(out, 1).unlink()
    path.rename(path.with_name(path.name.replace("00000-", "00001-")))


def take_from_another_run(out: Path, shop: Path) -> None:
    block(out).unlink()
    shutil.copy(block(shop / "other"), block(out, 0).parent)


def replace_by(make: Callable[[Path], object]) -> Callable[[Path, Path], None]:
    def damage(out: Path, shop: Path) -> None:
        path = block(out)
        path.unlink()
        make(path)

    return damage


WEIGHT = "weight:mlp.up_proj"
DAMAGES: dict[str, Callable[[Path, Path], None]] = {
    "renamed": rename,
    "of another run": take_from_another_run,
    "folder": replace_by(Path.mkdir),
    "pipe": replace_by(os.mkfifo),
    "device": replace_by(lambda path: path.symlink_to("/dev/zero")),
    "NaN": rewritten(lambda c: c[0][WEIGHT].fill_(torch.nan)),
    "infinite": rewritten(lambda c: c[0][WEIGHT].fill_(torch.inf)),
    "dense": rewritten(lambda c: c[0][WEIGHT].fill_(1.0)),
    "shape": rewritten(lambda c: c[0].update({WEIGHT: c[0][WEIGHT].T.contiguous()})),
    "type": rewritten(lambda c: c[0].update({WEIGHT: c[0][WEIGHT].double()})),
    "scalar": rewritten(lambda c: c[0].update({WEIGHT: torch.zeros(())})),
    "no mask": rewritten(lambda c: c[0].pop("mask:mlp.up_proj")),
    "no matrix": rewritten(lambda c: (c[0].pop(WEIGHT), c[0].pop("mask:mlp.up_proj"))),
    "bias": rewritten(lambda c: c[0].update({"bias:mlp.up_proj": torch.zeros(3)})),
    "no records": rewritten(lambda c: c[1].update(records="")),
    "deep": rewritten(lambda c: c[1].update(records="[" * 100_000)),
    "list": rewritten(lambda c: c[1].update(records="[1]")),
    "error": rewritten(set_figure("relative_error", None)),
    "name": rewritten(set_figure("name", "model.layers.0.mlp.up_proj")),
    "three sizes": rewritten(set_figure("shape", [8, 8, 8])),
    "no index": rewritten(lambda c: c[1].pop("index")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_changed_block_is_refused(
    shop: Path, out: Path, damage: Callable[[Path, Path], None]
) -> None:
    damage(out, shop)
    with pytest.raises(DataError, match="start over with --no-resume") as caught:
        prune(shop / "model", out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_only_blocks_of_this_run_are_read(shop: Path, out: Path) -> None:
    """A worker of a killed run writes one more block while a new run starts over."""

    class Worker(KillAt):
        def on_start(self, *counts: Any) -> None:
            shutil.copy(block(shop / "other"), out.parent / "out.partial/layerwise/blocks")

        def on_layer(self, record: Any) -> None: ...

    prune(shop / "model", out, resume=False, callbacks=[Worker(0)])
    assert not differing(files_of(out), files_of(shop / "whole"))


def test_solved_layers_are_checked_as_well(shop: Path, tmp_path: Path) -> None:
    collect_grams(shop / "model", tmp_path / "grams", **DATA)

    def solve(stop: bool = False) -> None:
        def on_layer(record: Any) -> None:
            if stop and ".1." in record.name:
                raise Killed

        solve_grams(
            tmp_path / "grams", "wanda", 0.5, output_dir=tmp_path / "out", on_layer=on_layer
        )

    with pytest.raises(Killed):
        solve(stop=True)
    first, second = block(tmp_path / "out", 0), block(tmp_path / "out", 1)
    second.unlink()
    shutil.copy(first, second.with_name(first.name.replace("00000-", "00001-")))
    with pytest.raises(DataError, match="start over with --no-resume"):
        solve()


@pytest.mark.parametrize("objective", ["matrix", "tokens"])
@pytest.mark.parametrize("damage", ["renamed", "changed", "pipe"])
def test_states_of_a_retraining_are_checked(
    shop: Path, tmp_path: Path, objective: str, damage: str
) -> None:
    class Stop(KillAt):
        def on_step(self, *values: Any) -> None:
            if objective == "tokens" and values[1] == 2:
                raise Killed

    def retrain(**options: Any) -> None:
        retrain_model(
            shop / "whole",
            parameters="norms" if objective == "tokens" else "masklora",
            objective=objective,
            dense=shop / "model",
            steps=3,
            batch_size=2,
            save_every=1,
            output_dir=tmp_path / "out",
            **DATA,
            **options,
        )

    with pytest.raises(Killed):
        retrain(callbacks=[Stop(2)])
    blocks = tmp_path / "out.partial" / "layerwise" / "blocks"
    path = blocks / ("training" if objective == "tokens" else "00001")
    path = path.with_suffix(".safetensors")
    data = path.read_bytes()
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif objective == "matrix":
        (blocks / "00000.safetensors").rename(path)
    else:
        data = data.replace(b'"training.safetensors"', b'"00000000.safetensors"')
        path.write_bytes(data)
    with pytest.raises(DataError, match="start over with --no-resume"):
        retrain()

"""Files of finished blocks and the log: what survives the disk, and what is damaged."""

import json
from pathlib import Path

import pytest
import torch

from layerwise.errors import DataError
from layerwise.run.pipeline.journal import Journal, read_layers, read_masks
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import PrunedBlock
from tests.support.models import shard_hashes


def record(name: str) -> LayerRecord:
    return LayerRecord(
        name=name,
        shape=(3, 5),
        method="wanda",
        pattern="0.5",
        sparsity=0.4,
        relative_error=0.125,
        status="feasible",
        certificate=None,
        certificate_kind=None,
        damping=0.01,
        damping_raised=False,
        rank=5,
        dead_channels=0,
        n_tokens=72,
        iterations=0,
        seconds=0.5,
    )


def make_block() -> PrunedBlock:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator).bfloat16()
    weight = weight.clamp(min=0)
    return PrunedBlock({"q": weight.T}, {"q": weight.T > 0}, [record("block.q")])


def test_block_survives_the_disk(tmp_path: Path) -> None:
    block = make_block()
    Journal(tmp_path / "out", {"seed": 0}).write_block(4, block)
    journal = Journal(tmp_path / "out", {"seed": 0})
    found = journal.read_block(4)
    assert found is not None
    assert torch.equal(found.weights["q"], block.weights["q"])
    assert found.weights["q"].dtype == torch.bfloat16
    assert torch.equal(found.masks["q"], block.masks["q"])
    assert found.records == block.records
    assert journal.read_block(3) is None


@pytest.mark.parametrize("damage", ["cut", "strange", "empty", "flipped"])
def test_damaged_block_is_named(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save

    journal = Journal(tmp_path / "out", {})
    journal.write_block(0, make_block())
    path = journal.block_path(0)
    assert path is not None
    content = {
        "cut": path.read_bytes()[:-1],
        "strange": save({"weight:q": torch.zeros(2)}),
        "empty": b"",
        "flipped": path.read_bytes()[:-1] + b"\x01",
    }
    path.write_bytes(content[damage])
    with pytest.raises(DataError, match=r"00000-\w+\.safetensors is damaged") as caught:
        journal.read_block(0)
    assert "\n" not in str(caught.value)


def test_masks_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    masks = {f"layer.{index}": torch.eye(index + 1) > 0 for index in range(20)}
    Journal(tmp_path / "a", {}).write_masks(masks)
    Journal(tmp_path / "b", {}).write_masks(dict(reversed(masks.items())))
    assert shard_hashes(tmp_path / "a.partial") == shard_hashes(tmp_path / "b.partial")
    (tmp_path / "a.partial").rename(tmp_path / "a")
    found = read_masks(tmp_path / "a")
    assert set(found) == set(masks)
    assert all(torch.equal(mask, found[name]) for name, mask in masks.items())


@pytest.mark.parametrize(
    "line",
    ["", "[]", "3", "{}", "{", json.dumps(record("q").to_dict() | {"more": 1})],
)
def test_damaged_log_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "layerwise").mkdir()
    log = tmp_path / "layerwise" / "layers.jsonl"
    log.write_text(json.dumps(record("q").to_dict()) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"layers\.jsonl is damaged"):
        read_layers(tmp_path)


def test_folder_of_somebody_else_has_no_log_and_no_masks(tmp_path: Path) -> None:
    for read in (read_layers, read_masks):
        with pytest.raises(DataError, match="it is not an output of layerwise"):
            read(tmp_path)

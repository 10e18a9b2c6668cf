"""Calibrating once: stored moments are those of a prune, shared, and safe from signals."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerwise.cli import run
from layerwise.errors import DataError, UnsupportedModelError, UsageError
from layerwise.grams import collect_grams as module
from layerwise.grams.collect_grams import collect_grams
from layerwise.grams.gram_folder import read_manifest
from layerwise.grams.layer_files import read_file, read_layers
from layerwise.moments import even_exponent
from layerwise.run.checkpoints.hashes import file_sha256
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model
from layerwise.timing.race import race
from tests.support.models import (
    mixture_of_experts,
    save_checkpoint,
    shard_hashes,
    tiny_model,
    tiny_text,
)
from tests.support.pruning import CALIBRATION, prune_and_record


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, a text, and the grams of one of them."""
    folder = tmp_path_factory.mktemp("calibrate")
    save_checkpoint(folder / "llama", tiny_model("llama", dtype=torch.bfloat16))
    save_checkpoint(folder / "gpt2", tiny_model("gpt2"))
    save_checkpoint(folder / "mixture", mixture_of_experts())
    (folder / "text.txt").write_text(tiny_text())
    calibrate(folder / "llama", folder / "grams")
    return folder


def calibrate(model: Path, output: Path, **options: Any) -> Any:
    sequences, length = CALIBRATION.shape
    return collect_grams(
        model,
        output,
        **{
            "calibration": CALIBRATION,
            "n_sequences": sequences,
            "sequence_length": length,
            **options,
        },
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_stored_problems_are_those_of_a_prune(
    family: str, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(workshop / family, tmp_path / "grams")
    stored = {layer.name: layer for layer in read_layers(tmp_path / "grams")}
    model = load_model(Checkpoint.open(workshop / family))
    _, posed = prune_and_record(monkeypatch, model, error_correction="none")
    assert set(stored) == set(posed)
    for name, problem in posed.items():
        layer, moments = stored[name], problem.moments
        given = layer.moments.scaled(2.0 ** -even_exponent(layer.moments.mean_diagonal))
        assert layer.weight.dtype == problem.weight.dtype
        assert torch.equal(layer.weight, problem.weight)
        assert torch.equal(given.gram, moments.gram)
        assert given.input_mean is not None
        assert moments.input_mean is not None
        assert torch.equal(given.input_mean, moments.input_mean)
        assert layer.moments.fluctuation is not None
        assert layer.moments.n_tokens == moments.n_tokens == CALIBRATION.numel()


def test_layers_with_the_same_inputs_share_one_gram(workshop: Path) -> None:
    first = workshop / "grams" / "00000-00.safetensors"
    prefix = "model.layers.0.self_attn"
    weights = {f"{prefix}.{name}_proj.weight" for name in "qkv"}
    assert set(load_file(first)) == weights | {"gram", "input_mean", "fluctuation"}
    k, q, v = read_file(first)
    assert k.moments is q.moments is v.moments
    assert [layer.name[-6:] for layer in (k, q, v)] == ["k_proj", "q_proj", "v_proj"]
    assert len(list((workshop / "grams").glob("*.safetensors"))) == 8


def test_manifest_describes_the_folder(workshop: Path) -> None:
    folder = workshop / "grams"
    manifest = read_manifest(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {*manifest.files, "manifest.json"}
    assert {name: stage.sha256 for name, stage in manifest.files.items()} == shard_hashes(
        folder
    )
    source = workshop / "llama" / "model.safetensors"
    assert manifest.source["model.safetensors"] == file_sha256(source)
    assert manifest.model_type == "llama"
    assert (manifest.recipe.error_correction, manifest.recipe.n_sequences) == ("none", 4)
    shapes = {name: layer.shape for _, name, layer in manifest.layers()}
    assert shapes["model.layers.1.mlp.down_proj"] == (16, 24)
    assert len(shapes) == 14


def test_weights_that_are_stored_as_transposes(workshop: Path, tmp_path: Path) -> None:
    manifest = calibrate(workshop / "gpt2", tmp_path / "grams")
    assert all(layer.transposed for _, _, layer in manifest.layers())
    found = {name: layer.shape for _, name, layer in manifest.layers()}
    assert found["transformer.h.0.mlp.c_fc"] == (24, 16)


def test_an_interrupted_run_continues(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def stop(name: str, width: int) -> None:
        if name.startswith("model.layers.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(workshop / "llama", tmp_path / "out", on_stage=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="unfinished run with another seed"):
        calibrate(workshop / "llama", tmp_path / "out", seed=1)
    calibrate(
        workshop / "llama", tmp_path / "out", on_stage=lambda name, _: seen.append(name)
    )
    assert len(seen) == 4
    assert all(name.startswith("model.layers.1") for name in seen)
    assert shard_hashes(tmp_path / "out") == shard_hashes(workshop / "grams")
    manifests = [f / "manifest.json" for f in (tmp_path / "out", workshop / "grams")]
    assert manifests[0].read_text() == manifests[1].read_text()


def test_a_run_that_fails_at_once_leaves_nothing(workshop: Path, tmp_path: Path) -> None:
    def stop(name: str, width: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(workshop / "llama", tmp_path / "out", on_stage=stop)
    assert list(tmp_path.iterdir()) == []


def test_file_that_vanishes_before_the_end(workshop: Path, tmp_path: Path) -> None:
    lost = tmp_path / "out.partial" / "00000-00.safetensors"

    def remove(name: str, width: int) -> None:
        if name.startswith("model.layers.1"):
            lost.unlink(missing_ok=True)

    with pytest.raises(DataError, match=f"cannot read {lost}"):
        calibrate(workshop / "llama", tmp_path / "out", on_stage=remove)


def test_what_is_there_is_not_replaced_unasked(workshop: Path, tmp_path: Path) -> None:
    calibrate(workshop / "llama", tmp_path / "out", targets="re:.*q_proj")
    with pytest.raises(UsageError, match="exists"):
        calibrate(workshop / "llama", tmp_path / "out")
    assert len(list(read_layers(tmp_path / "out"))) == 2
    calibrate(workshop / "llama", tmp_path / "out", ignore="re:.*q_proj", force=True)
    assert len(list(read_layers(tmp_path / "out"))) == 12


def test_weights_without_a_tensor_of_their_own(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModelError):
        calibrate(workshop / "mixture", tmp_path / "out")
    monkeypatch.setattr(module, "checkpoint_names", lambda model, source: {})
    with pytest.raises(UnsupportedModelError, match="q_proj: the checkpoint has no tensor"):
        calibrate(workshop / "llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_stored_means_can_be_raced(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.timing.floor.GEMM_SIZE", {"cpu": 16})
    monkeypatch.setattr("layerwise.timing.floor.COPY_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr("layerwise.timing.floor.LEAST_SECONDS", 0.0)
    one = workshop / "grams" / "00000-01.safetensors"
    assert [lap.method for lap in race("dsnot", grams=one, device="cpu").laps] == ["dsnot"]
    with pytest.raises(UsageError, match="gblm needs the gradient"):
        race("gblm", grams=one, device="cpu")


def test_command(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["calibrate", str(workshop / "llama"), "--n-sequences", "4"]
    arguments += ["--sequence-length", "12", "--calibration", str(workshop / "text.txt")]
    arguments += ["--output", str(tmp_path / "out"), "--targets", "re:.*mlp.*"]
    assert run(arguments) == 0
    printed = capsys.readouterr()
    assert "storing 4 files of grams" in printed.err
    assert "[4/4]  model.layers.1.mlp.down_proj  24 inputs" in printed.err
    assert printed.out == f"wrote {tmp_path / 'out'}: 6 layers\n"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["recipe"]["calibration"] == str(workshop / "text.txt")
    assert run(arguments) == 2
    assert "exists" in capsys.readouterr().err


# --- the files -------------------------------------------------------------------------


def test_own_moments_come_before_shared_ones(tmp_path: Path) -> None:
    shared, own = torch.eye(3, dtype=torch.float64), 2 * torch.eye(3, dtype=torch.float64)
    tensors = {"gram": shared, "b.gram": own}
    tensors |= {f"{name}.weight": torch.ones(2, 3) for name in "abc"}
    save_file(tensors, tmp_path / "some.safetensors", metadata={"n_tokens": "7"})
    a, b, c = read_layers(tmp_path)
    assert a.moments is c.moments
    assert torch.equal(a.moments.gram, shared)
    assert torch.equal(b.moments.gram, own)
    assert [layer.moments.n_tokens for layer in (a, b, c)] == [7, 7, 7]


@pytest.mark.parametrize(
    ("changes", "metadata", "words"),
    [
        ({"gram": None}, {}, "bad.safetensors has no gram of layer 'a'"),
        ({"cross_gram": torch.eye(3)}, {}, "has no energy of layer 'a'"),
        ({"gram": torch.full((3, 3), torch.nan)}, {}, "bad.safetensors: gram contains nan"),
        ({"gram": torch.ones(3)}, {}, "bad.safetensors: gram must be a square matrix"),
        ({"input_mean": torch.ones(2)}, {}, "bad.safetensors: input_mean has shape"),
        ({}, {"n_tokens": "-1"}, "bad.safetensors has n_tokens '-1'"),
        ({}, {"n_tokens": "٣"}, "bad.safetensors has n_tokens"),
    ],
)
def test_files_that_are_no_layers(
    changes: dict[str, Any], metadata: dict[str, str], words: str, tmp_path: Path
) -> None:
    content = {"gram": torch.eye(3), "a.weight": torch.ones(2, 3), **changes}
    tensors = {name: value for name, value in content.items() if value is not None}
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(DataError, match=words):
        list(read_layers(tmp_path))

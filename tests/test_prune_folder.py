"""The folder that a prune writes: bytes, claims, and the same again for the same seed."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline.journal import read_layers, read_masks
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from tests.support.models import differing, save_checkpoint, shard_hashes, tiny_model
from tests.support.text_runs import by_path, in_memory, perplexity_of, sharded_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded_llama(tmp_path_factory.mktemp("models") / "llama")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {
        n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()
    }


def test_untouched_tensors_keep_their_bytes(llama: Path, tmp_path: Path) -> None:
    report = by_path(llama, tmp_path / "out", "sparsegpt")
    before, after = tensors_of(llama), tensors_of(tmp_path / "out")
    assert list(after) == list(before)
    for name, tensor in after.items():
        same = torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))
        assert same == (name not in report.masks), name
        assert tensor.dtype == before[name].dtype
    shards = sorted(path.name for path in llama.glob("*.safetensors"))
    assert len(shards) > 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    for path in llama.iterdir():
        if path.suffix == ".json":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_folder_says_what_was_done(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = by_path(llama, out, "wanda+least-squares", seed=5)
    assert report.output_dir == out
    assert {path.name for path in (out / "layerwise").iterdir()} == {
        "layers.jsonl",
        "manifest.json",
        "masks.safetensors",
    }
    assert tuple(read_layers(out)) == report.records
    masks = read_masks(out)
    assert not differing(
        {name: mask.tolist() for name, mask in masks.items()},
        {name: mask.tolist() for name, mask in report.masks.items()},
    )
    recipe = Recipe.read(out / "recipe.yaml")
    assert (recipe.method, recipe.sparsity, recipe.seed) == ("wanda+least-squares", 0.5, 5)
    card = (out / "README.md").read_text()
    assert "wanda+least-squares" in card
    assert card.startswith("---\nbase_model:")
    assert not (tmp_path / "out.partial").exists()
    assert "sparsity" not in (out / "config.json").read_text()


def test_reloaded_folder_is_the_reported_model(llama: Path, tmp_path: Path) -> None:
    report = by_path(llama, tmp_path / "out", "sparsegpt")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.dtype == torch.bfloat16
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, report.model.state_dict()[name]), name
    assert perplexity_of(reloaded) == perplexity_of(report.model)
    original = AutoModelForCausalLM.from_pretrained(llama)
    assert perplexity_of(reloaded) != perplexity_of(original)


@pytest.mark.parametrize("from_object", [True, False])
def test_tied_embeddings_stay_tied(tmp_path: Path, from_object: bool) -> None:
    model = tiny_model("qwen2", tied=True)
    if from_object:
        report = in_memory(model, output_dir=tmp_path / "out")
    else:
        save_checkpoint(tmp_path / "source", model)
        report = by_path(tmp_path / "source", tmp_path / "out")
    pruned: Any = report.model
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    assert perplexity_of(reloaded) == perplexity_of(report.model)


def test_model_object_can_be_saved(tmp_path: Path) -> None:
    report = in_memory(tiny_model("opt"), output_dir=tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert perplexity_of(reloaded) == perplexity_of(report.model)
    assert load_tokenizer(Checkpoint.open(tmp_path / "out")) is not None
    assert set(read_masks(tmp_path / "out")) == set(report.masks)


@pytest.mark.parametrize("shards", ["1GB", "9KB"])
def test_path_and_object_give_the_same_weights(tmp_path: Path, shards: str) -> None:
    source = save_checkpoint(
        tmp_path / "source", tiny_model("mistral"), max_shard_size=shards
    )
    report = by_path(source, tmp_path / "out", "sparsegpt")
    other = in_memory(tiny_model("mistral"), "sparsegpt")
    for name, tensor in report.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_same_seed_same_bytes(llama: Path, tmp_path: Path, mode: str) -> None:
    by_path(llama, tmp_path / "a", "sparsegpt", error_correction=mode)
    torch.manual_seed(123)
    by_path(llama, tmp_path / "b", "sparsegpt", error_correction=mode)
    assert shard_hashes(tmp_path / "a") == shard_hashes(tmp_path / "b")
    by_path(llama, tmp_path / "c", "sparsegpt", error_correction=mode, seed=1)
    assert shard_hashes(tmp_path / "a") != shard_hashes(tmp_path / "c")


def test_global_generators_are_not_touched(llama: Path, tmp_path: Path) -> None:
    def states() -> list[str]:
        numbers = np.random.get_state(legacy=False)
        return [str(torch.get_rng_state().tolist()), str(random.getstate()), str(numbers)]

    before = states()
    by_path(llama, tmp_path / "out", "sparsegpt")
    in_memory(tiny_model("opt").train(), "fista", options={"max_rounds": 2})
    assert states() == before

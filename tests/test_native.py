"""The native format: what it gives back, who refuses it, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import layerwise
from layerwise.errors import DataError, LayerwiseError, UnsupportedModelError, UsageError
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.native import SURGERY as SURGERY_FILE
from layerwise.run.models.native import save_native
from layerwise.run.models.opening import load_model
from layerwise.run.models.rewrite import add_bias
from layerwise.run.models.surgery import Cut, shrink, steps_of
from tests.support.cutting import (
    COUPLED,
    PACKAGED,
    distance,
    logits_of,
    model_of,
    names_of,
    random_cuts,
)
from tests.support.models import edit_shard, random_tokens, tiny_tokenizer
from tests.support.tolerances import SURGERY


def saved(folder: Path, family: str = "llama", **more: Any) -> Any:
    """A model whose blocks differ in everything, and its native folder."""
    model, adapter = model_of(family, **more)
    shrink(model, adapter, random_cuts(model, adapter, names_of(family)), "native")
    save_native(model, folder)
    return model


@pytest.mark.parametrize("family", [*COUPLED, *PACKAGED])
def test_native_folders_open_as_they_were(family: str, tmp_path: Path) -> None:
    model = saved(tmp_path, family)
    loaded: Any = layerwise.load(tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert steps_of(loaded) == steps_of(model)
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    tokens = random_tokens(1, 5)
    settings = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 3}
    words = [m.generate(tokens, do_sample=False, **settings) for m in (loaded, model)]
    assert torch.equal(*words)
    with pytest.raises(ValueError, match="layerwise_native"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tensors_in_the_folder_are_smaller(tmp_path: Path) -> None:
    model = saved(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {n: t.shape for n, t in stored.items()} == {
        n: t.shape for n, t in model.state_dict().items()
    }


def test_the_class_of_the_original_refuses_it_as_well(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        LlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_shards_and_half_precision(tied: bool, tmp_path: Path) -> None:
    model, adapter = model_of("llama", dtype=torch.bfloat16, tied=tied)
    shrink(model, adapter, random_cuts(model, adapter, names_of("llama")), "native")
    save_native(model, tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = layerwise.load(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_added_biases_come_back(tmp_path: Path) -> None:
    model, adapter = model_of("mistral")
    names = ["self_attn.o_proj", "mlp.down_proj"]
    for block, name in zip((0, 2), names, strict=True):
        add_bias(model.get_submodule(f"model.layers.{block}.{name}"), torch.randn(16))
    shrink(model, adapter, random_cuts(model, adapter, names_of("mistral")), "native")
    save_native(model, tmp_path)
    assert torch.equal(logits_of(layerwise.load(tmp_path)), logits_of(model))
    assert json.loads((tmp_path / SURGERY_FILE).read_text())["biases"] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.2.mlp.down_proj",
    ]


def test_biases_of_mamba_tell_the_mixer(tmp_path: Path) -> None:
    """Fused kernels for training ask the mixer and not the layer."""
    model, adapter = model_of("mamba")
    add_bias(model.backbone.layers[1].mixer.out_proj, torch.randn(16))
    shrink(model, adapter, random_cuts(model, adapter, ["inner"]), "native")
    assert [block.mixer.use_bias for block in model.backbone.layers] == [False, True, False]
    save_native(model, tmp_path)
    loaded: Any = layerwise.load(tmp_path)
    assert [block.mixer.use_bias for block in loaded.backbone.layers] == [
        False,
        True,
        False,
    ]
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_cuts_in_several_steps_come_back(tmp_path: Path) -> None:
    model, adapter = model_of("llama")
    for seed in range(2):
        kept = torch.arange(seed, 12 - seed)
        shrink(model, adapter, [Cut("model.layers.0", "mlp", kept)], "native")
    values = Cut("model.layers.0", "values", torch.tensor([0, 2, 5]))
    shrink(model, adapter, [values], "native")
    save_native(model, tmp_path)
    loaded = layerwise.load(tmp_path)
    assert len(steps_of(loaded)) == 3
    assert torch.equal(logits_of(loaded), logits_of(model))
    save_native(loaded, tmp_path / "again")
    again = tmp_path / "again"
    for name in (SURGERY_FILE, "config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


def test_narrow_values_cannot_be_cut_again() -> None:
    model, adapter = model_of("llama")
    cuts = random_cuts(model, adapter, ["values"])
    shrink(model, adapter, cuts, "native")
    with pytest.raises(UnsupportedModelError, match="found ScatteredLinear"):
        shrink(model, adapter, cuts, "native")


def test_other_folders_open_too(tmp_path: Path) -> None:
    model, adapter = model_of("opt")
    cuts = random_cuts(model, adapter, ["mlp"], uniform=True)
    shrink(model, adapter, cuts)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(layerwise.load(tmp_path, device="cpu")), logits_of(model))
    with pytest.raises(DataError, match="there is no folder"):
        layerwise.load(tmp_path / "nothing here")


def test_the_rest_of_the_toolkit_reads_native_folders(tmp_path: Path) -> None:
    model = saved(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert SURGERY_FILE in checkpoint.side_files()
    assert load_tokenizer(checkpoint) is not None
    assert distance(logits_of(load_model(checkpoint)), logits_of(model)) <= SURGERY


def test_a_parameter_that_nothing_explains(tmp_path: Path) -> None:
    model, _ = model_of("llama")
    model.model.layers[0].scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(
        UsageError, match=r"layers\.0\.scale is not a parameter of this Llama"
    ):
        save_native(model, tmp_path)


# -- damaged and hostile folders -------------------------------------------------------


def surgery(edit: Callable[[Any], object]) -> Callable[[Path], None]:
    """Edit the record of the cuts."""

    def apply(folder: Path) -> None:
        path = folder / SURGERY_FILE
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))

    return apply


def config(edit: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        edit(values)
        path.write_text(json.dumps(values))

    return apply


def tensors(edit: Callable[[Any], object]) -> Callable[[Path], None]:
    return lambda folder: edit_shard(folder / "model.safetensors", edit)


def first(values: Any) -> Any:
    return values["steps"][0]["model.layers.1"]


def step(values: Any) -> Any:
    return values["steps"][0]


V = "model.layers.1.self_attn.v_proj.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no record": (lambda folder: (folder / SURGERY_FILE).unlink(), "surgery.json"),
    "no json": (lambda f: (f / SURGERY_FILE).write_text("{"), "not usable JSON"),
    "a list": (lambda f: (f / SURGERY_FILE).write_text("[]"), "must hold a JSON object"),
    "no steps": (surgery(lambda v: v.pop("steps")), "damaged at steps: Field required"),
    "more keys": (surgery(lambda v: v.update(code="x")), "damaged at code"),
    "text for a unit": (
        surgery(lambda v: first(v).update(mlp=["1"])),
        "model.layers.1.mlp.0",
    ),
    "half a unit": (surgery(lambda v: first(v).update(mlp=[1.5])), "model.layers.1.mlp.0"),
    "later version": (surgery(lambda v: v.update(version=2)), "version 2"),
    "missing block": (
        surgery(lambda v: step(v).pop("model.layers.1")),
        "'model.layers.1.self_attn.q_proj.weight'",
    ),
    "missing coupling": (
        surgery(lambda v: first(v).pop("mlp")),
        "'model.layers.1.mlp.gate_proj.weight'",
    ),
    "no steps left": (surgery(lambda v: v["steps"].clear()), "has shape"),
    "unknown block": (surgery(lambda v: step(v).update(lm_head={"mlp": [0]})), "'lm_head'"),
    "unknown coupling": (surgery(lambda v: first(v).update(inner=[0])), "'inner'"),
    "out of range": (
        surgery(lambda v: first(v).update(mlp=[0, 24])),
        "'mlp' in model.layers.1 keeps units 0 to 24: choose from 0 to 23",
    ),
    "far out of range": (
        surgery(lambda v: first(v).update(mlp=[10**30])),
        "model.layers.1",
    ),
    "negative": (surgery(lambda v: first(v).update(mlp=[-1, 0])), "model.layers.1.mlp.0"),
    "twice": (surgery(lambda v: first(v).update(mlp=[1, 1])), "each once"),
    "nothing kept": (surgery(lambda v: first(v).update(mlp=[])), "at least one unit"),
    "another number": (
        surgery(lambda v: first(v).update(mlp=[0])),
        "'model.layers.1.mlp.gate_proj.weight'",
    ),
    "bias elsewhere": (surgery(lambda v: v["biases"].append("lm_head")), "'lm_head'"),
    "bias of no linear": (
        surgery(lambda v: v["biases"].append("model.layers.0.mlp")),
        "'model.layers.0.mlp' is not a linear layer",
    ),
    "bias that is not stored": (
        surgery(lambda v: v["biases"].append("model.layers.0.mlp.down_proj")),
        "lacks tensors of the model: model.layers.0.mlp.down_proj.bias",
    ),
    "no original": (
        config(lambda v: v.pop("original")),
        "lacks the original configuration",
    ),
    "original is text": (
        config(lambda v: v.update(original="llama")),
        "lacks the original",
    ),
    "impossible original": (
        config(lambda v: v["original"].update(num_attention_heads=3)),
        "config.json is invalid",
    ),
    "another width": (config(lambda v: v["original"].update(hidden_size=32)), "has shape"),
    "too many layers": (
        config(lambda v: v["original"].update(num_hidden_layers=10**6)),
        "num_hidden_layers 1000000",
    ),
    "one layer less": (
        config(lambda v: v["original"].update(num_hidden_layers=2)),
        "no block 'model.layers.2'",
    ),
    "missing tensor": (tensors(lambda t: t.pop(V)), f"lacks tensors of the model: {V}"),
    "another shape": (
        tensors(lambda t: t.update({V: t[V][:-1].clone()})),
        f"tensor {V!r}",
    ),
    "surplus tensor": (
        tensors(lambda t: t.update({"model.layers.0.extra": torch.zeros(1)})),
        "model.layers.0.extra",
    ),
    "not a number": (tensors(lambda t: t[V].fill_(torch.nan)), f"tensor {V!r}"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_folders_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    damage, expected = DAMAGES[kind]
    saved(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError) as caught:
        layerwise.load(tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "error", "expected"),
    [
        (
            {"model_type": "gpt2"},
            UnsupportedModelError,
            "'gpt2', which this layerwise cannot cut",
        ),
        ({"model_type": None}, DataError, "names no model_type"),
        ({"quantization_config": {"bits": 4}}, UnsupportedModelError, "quantised"),
        ({"transformers_weights": "x"}, DataError, "redirects the weights"),
        ({"attn_implementation": "a/b"}, UnsupportedModelError, "code from the hub"),
    ],
)
def test_the_original_configuration_is_checked_like_any(
    edit: dict[str, Any], error: type[LayerwiseError], expected: str, tmp_path: Path
) -> None:
    saved(tmp_path)
    config(lambda values: values["original"].update(edit))(tmp_path)
    with pytest.raises(error, match=expected):
        layerwise.load(tmp_path)


def test_the_record_may_not_leave_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    saved(folder)
    (folder / SURGERY_FILE).rename(tmp_path / "elsewhere.json")
    (folder / SURGERY_FILE).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DataError, match="leaves the folder"):
        layerwise.load(folder)

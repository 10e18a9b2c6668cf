"""Objects that a folder could not hold: refused before the first pass over the model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from layerwise.adapters import get_adapter
from layerwise.errors import UsageError
from layerwise.run.models.surgery import Cut, shrink
from layerwise.run.models.writable import check_writable
from layerwise.run.outputs.verify import verify
from tests.support.models import Decoder, blocks_of, differing, tiny_model
from tests.support.pruning import prune
from tests.support.shrinking import smaller


def generation(model: Any) -> None:
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.6


def head_tied(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def norms_tied(model: Any) -> None:
    first, second = blocks_of(model)
    second.input_layernorm.weight = first.input_layernorm.weight


def head_untied(model: Any) -> None:
    model.config.tie_word_embeddings = True


def layer_deleted(model: Any) -> None:
    del model.model.layers[1]


def layer_added(model: Any) -> None:
    model.model.layers.append(tiny_model("llama").model.layers[0])


def bias_added(model: Any) -> None:
    linear = blocks_of(model)[0].mlp.down_proj
    linear.bias = nn.Parameter(torch.ones(linear.out_features))


def buffer_added(model: Any) -> None:
    model.model.register_buffer("scale", torch.ones(3))


def rows_added(model: Any) -> None:
    model.lm_head = nn.Linear(model.config.hidden_size, 300, bias=False)


def configuration(model: Any) -> None:
    model.config.num_attention_heads = 5


DIFFERENCES: Mapping[str, tuple[Callable[[Any], None], str]] = {
    "generation": (generation, r"temperature.*correct model\.generation_config"),
    "head tied": (head_tied, r"lm_head\.weight and .* one tensor.*embeddings = True"),
    "norms tied": (norms_tied, r"1\.input_layernorm\.weight and .* are one tensor"),
    "head untied": (head_untied, r"lm_head\.weight and .* two tensors.*= False"),
    "layer deleted": (layer_deleted, r"layers\.1\..* is missing in the model"),
    "layer added": (layer_added, r"layers\.2\..* is in the model, but its config"),
    "bias added": (bias_added, r"0\.mlp\.down_proj\.bias is in the model"),
    "buffer added": (buffer_added, r"model\.scale is in the model"),
    "rows added": (rows_added, r"lm_head\.weight has shape \(300, 16\), .*\(288, 16\)"),
    "configuration": (configuration, r"config of this Llama.* correct model\.config"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_an_object_that_differs_from_its_configuration(
    difference: str, tmp_path: Path
) -> None:
    change, message = DIFFERENCES[difference]
    model = tiny_model("llama")
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=message) as caught:
        prune(model, output_dir=tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
    after = model.state_dict()
    assert not [name for name in before if not torch.equal(before[name], after[name])]


@pytest.mark.parametrize("difference", ["head tied", "layer deleted", "bias added"])
def test_without_an_output_it_is_pruned(difference: str) -> None:
    model = tiny_model("llama")
    DIFFERENCES[difference][0](model)
    assert prune(model).records


def test_an_object_changed_with_its_configuration_is_written(tmp_path: Path) -> None:
    model = tiny_model("llama")
    layer_deleted(model)
    model.config.num_hidden_layers = 1
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.resize_token_embeddings(300, mean_resizing=False)
    prune(model, output_dir=tmp_path / "out")
    assert all(check.holds for check in verify(tmp_path / "out"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    assert not differing({n: t.tolist() for n, t in read.state_dict().items()}, own)


@pytest.mark.parametrize("family", ["opt", "mamba", "gpt2", "gemma2", "falcon_mamba"])
@pytest.mark.parametrize("tied", [False, True])
def test_fresh_models_can_be_written(family: str, tied: bool) -> None:
    check_writable(tiny_model(family, tied=tied))


def test_a_model_in_the_native_format_is_written_by_its_own_writer(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cut = Cut("model.layers.0", "mlp", torch.arange(12))
    shrink(model, get_adapter("llama"), [cut], format="native")
    with pytest.raises(UsageError, match="cut in the native format"):
        prune(model, output_dir=tmp_path / "zeros")
    smaller(model, sparsity=0.1, format="native", output_dir=tmp_path / "out")
    assert all(check.holds for check in verify(tmp_path / "out"))


def test_what_has_no_writer_is_refused() -> None:
    with pytest.raises(UsageError, match="this Decoder has no save_pretrained"):
        check_writable(Decoder())
    with pytest.raises(UsageError, match="the tokenizer has no save_pretrained"):
        check_writable(tiny_model("llama"), tokenizer=str.split)

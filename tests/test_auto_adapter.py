"""Decoders without an adapter of their own: what is found and proven."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForCausalLM, GPTJConfig, GPTJForCausalLM

from layerwise.adapters import ADAPTERS, Adapter, Stage, get_adapter
from layerwise.adapters.auto import discover
from layerwise.errors import InvalidProblemError, UnsupportedModelError
from layerwise.patterns import NM
from layerwise.run.models.architecture import adapter_of
from layerwise.run.report import PruneReport
from tests.support.models import (
    FAMILIES,
    INNER,
    VOCABULARY,
    WIDTH,
    Block,
    Decoder,
    blocks_name,
    random_tokens,
    tiny_model,
)
from tests.support.pruning import prune

TOKENS = random_tokens(2, 8)
GEMMA = (
    Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Stage(("self_attn.o_proj",)),
    Stage(("mlp.gate_proj", "mlp.up_proj")),
    Stage(("mlp.down_proj",)),
)
STAGES = {
    "gpt2": tuple(
        Stage((name,)) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ),
    "gpt_neox": (
        Stage(("attention.query_key_value",)),
        Stage(("attention.dense",)),
        Stage(("mlp.dense_h_to_4h",)),
        Stage(("mlp.dense_4h_to_h",)),
    ),
    "phi": (  # attention and MLP side by side, after one norm
        Stage(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")),
        Stage(("self_attn.dense",)),
        Stage(("mlp.fc2",)),
    ),
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
}


def found(model: Any) -> Adapter:
    return discover(model, TOKENS)


# --- what is found -----------------------------------------------------------------------


def test_all_families_without_a_declaration_are_looked_at() -> None:
    assert set(STAGES) == set(FAMILIES) - set(ADAPTERS)


@pytest.mark.parametrize("family", STAGES)
def test_stages(family: str) -> None:
    model = tiny_model(family)
    adapter = adapter_of(model)
    assert adapter.found
    assert adapter.unserved == {}
    assert adapter.blocks == blocks_name(model)
    for block in adapter.blocks_of(model):
        assert adapter.stages_of(block) == STAGES[family]


@pytest.mark.parametrize("family", ["opt", "llama", "mistral", "qwen2", "qwen3", "mamba2"])
def test_what_is_found_is_what_is_declared(family: str) -> None:
    model, declared = tiny_model(family), get_adapter(family)
    adapter = found(model)
    assert adapter_of(model) is declared
    assert adapter.blocks == declared.blocks
    for block in declared.blocks_of(model):
        assert adapter.stages_of(block) == declared.stages


def test_blocks_have_stages_of_their_own() -> None:
    model = tiny_model("llama")
    block = model.model.layers[1]
    block.self_attn.k_proj = nn.Sequential(nn.Identity(), block.self_attn.k_proj)
    adapter = found(model)
    first, second = (adapter.stages_of(name)[0].linears for name in adapter.by_block)
    assert first[1] == "self_attn.k_proj"
    assert second[1] == "self_attn.k_proj.1"


def test_mode_and_hooks_are_given_back() -> None:
    model = tiny_model("gpt2").train()
    adapter_of(model)
    assert all(module.training for module in model.modules())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_the_log_says_what_was_found() -> None:
    told: list[Any] = []

    class Listener:
        def on_note(self, text: str) -> None:
            told.append(text)

        def on_start(self, n_layers: int) -> None:
            told.append(n_layers)

        def on_layer(self, record: Any) -> None: ...

        def on_finish(self, report: PruneReport) -> None: ...

    prune(tiny_model("gpt2"), callbacks=[Listener()])
    note, count = told
    assert count == 8
    assert "no adapter is declared for this GPT2LMHeadModel: blocks transformer.h" in note
    assert "the 8 layers to prune hold 9" in note
    told.clear()
    prune(tiny_model("llama"), callbacks=[Listener()])
    assert told == [14]


# --- weights that are stored transposed --------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "sequential", "block", "full"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda+least-squares"])
def test_storage_does_not_change_the_answer(method: str, mode: Any) -> None:
    """GPT-2 with its layers replaced by ordinary ones is pruned to the same weights."""
    stored, ordinary = tiny_model("gpt2"), with_ordinary_linears(tiny_model("gpt2"))
    one = prune(stored, method, error_correction=mode)
    other = prune(ordinary, method, error_correction=mode)
    assert len(one.records) == 8
    for record, expected in zip(one.records, other.records, strict=True):
        assert record.shape == expected.shape
        weight = f"{record.name}.weight"
        assert torch.equal(one.masks[weight], other.masks[weight].T)
        assert torch.allclose(
            stored.get_parameter(weight), ordinary.get_parameter(weight).T
        )


def with_ordinary_linears(model: Any) -> Any:
    for block in model.transformer.h:
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            stored = block.get_submodule(name)
            linear = nn.Linear(*stored.weight.shape)
            linear.weight.data, linear.bias.data = stored.weight.data.T, stored.bias.data
            block.set_submodule(name, linear)
    return model


def test_groups_run_along_the_inputs() -> None:
    model = tiny_model("gpt2")
    report = prune(model, sparsity="2:4")
    parameter = "transformer.h.0.mlp.c_proj.weight"
    weight, mask = model.get_parameter(parameter), report.masks[parameter]
    assert weight.shape == mask.shape == (INNER, WIDTH)  # (in, out)
    assert torch.equal(weight != 0, mask)
    assert NM(2, 4).accepts(mask.T.contiguous())
    assert not NM(2, 4).accepts(mask)
    assert report.records[3].shape == (WIDTH, INNER)  # (out, in)


def test_the_width_is_that_of_the_inputs() -> None:
    with pytest.raises(InvalidProblemError, match=r"c_attn: pattern 12:24 needs a width"):
        prune(tiny_model("gpt2"), sparsity="12:24")
    report = prune(tiny_model("gpt2"), sparsity="12:24", targets=r"re:.*mlp\.c_proj")
    assert len(report.records) == 2


# --- decoders written by hand ------------------------------------------------------------


class InPlace(Block):
    """Changes a tensor between two linears that receive it."""

    def forward(self, hidden: Tensor) -> Any:
        inner = hidden.clone()
        one = self.first(inner)
        inner.add_(1)
        return hidden + one + self.second(inner)


def test_smallest_decoder() -> None:
    adapter = adapter_of(Decoder())
    assert adapter.stages_of("layers.2") == (Stage(("first",)), Stage(("second",)))
    assert adapter.unserved == {}


def test_tensor_that_was_changed_is_another_one() -> None:
    adapter = adapter_of(Decoder(InPlace))
    assert adapter.stages_of("layers.0") == (Stage(("first",)), Stage(("second",)))


def test_inner_lists_are_no_blocks() -> None:
    """Experts in a list are more numerous than the blocks that hold them."""

    class Experts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(9))

        def forward(self, hidden: Tensor) -> Any:
            return hidden + self.experts[0](hidden) + self.first(hidden)

    adapter = found(Decoder(Experts))
    assert adapter.blocks == "layers"
    assert adapter.stages_of("layers.0") == (Stage(("experts.0", "first")),)
    assert len(adapter.unserved) == 3 * 9  # eight experts and `second` were never called


def test_list_that_does_not_run_is_not_taken() -> None:
    model = Decoder()
    model.vision = nn.ModuleList(Block() for _ in range(9))
    assert found(model).blocks == "layers"


def test_rarer_architectures() -> None:
    """Attention and MLP side by side, and cross-attention that a decoder never calls."""
    config = GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=16,
        rotary_dim=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    adapter = adapter_of(GPTJForCausalLM(config).eval())
    assert adapter.stages_of("transformer.h.1")[0].linears[-1] == "mlp.fc_in"
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=INNER,
        max_position_embeddings=16,
        is_decoder=True,
        is_encoder_decoder=False,
    )
    model = BartForCausalLM(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"encoder_attn.k_proj \(called 0"):
        prune(model)
    assert len(prune(model, ignore="re:.*encoder_attn.*").records) == 2 * 6

"""A model that is run without memory: its shapes, and the bytes that its blocks need."""

from typing import Any

import pytest
import torch

from layerwise.adapters import Adapter, Stage, get_adapter
from layerwise.errors import UnsupportedModelError
from layerwise.planning.dry import (
    LiveBytes,
    adapter_without_memory,
    without_memory,
    working_set,
)
from layerwise.planning.model_shape import model_shape
from layerwise.planning.scaling import llama_working
from layerwise.planning.shapes import StageShape
from layerwise.run.activations.streams import capture
from layerwise.run.models.architecture import adapter_of, embedding_rows
from tests.support.models import (
    FAMILIES,
    INNER,
    POSITIONS,
    WIDTH,
    Block,
    Decoder,
    mixture_of_experts,
    tiny_model,
)


def skeleton(family: str, **more: Any) -> Any:
    """Model of a family on the meta device."""
    from transformers import AutoModelForCausalLM

    config = tiny_model(family, **more).config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"falcon_mamba", "mistral"}))
def test_a_block_without_memory_needs_what_a_real_one_does(family: str) -> None:
    model = tiny_model(family)
    adapter = adapter_of(model)
    blocks = list(adapter.blocks_of(model).values())
    stream = capture(model, blocks, [torch.zeros(1, POSITIONS, dtype=torch.long)])
    peak = 0
    for calls, block in zip(stream.calls, blocks, strict=True):
        with torch.no_grad(), LiveBytes() as live:
            calls[0].run(block, stream.hidden[0], torch.device("cpu"))
        peak = max(peak, live.peak)
    length, size = working_set(skeleton(family), adapter, POSITIONS)[-1]
    assert length == POSITIONS
    # without numbers a mask of ones cannot be recognised and left out
    assert peak <= size <= peak + 8 * WIDTH * POSITIONS**2


def test_blocks_that_fail_alone_are_refused() -> None:
    class Needing(Block):
        def forward(self, hidden: Any, more: Any = None) -> Any:
            if more is None:
                message = "more is needed"
                raise ValueError(message)
            return hidden + self.second(self.first(hidden)), more

    model: Any = Decoder(Needing)
    model.dtype = torch.float32
    adapter = Adapter("own", "layers", (Stage(("first",)), Stage(("second",))))
    with pytest.raises(UnsupportedModelError, match=r"one by one .*more is needed"):
        working_set(model, adapter, 8)


@pytest.mark.parametrize("ask", [torch.nonzero, torch.Tensor.item])
def test_a_path_that_depends_on_values_has_no_plan(ask: Any) -> None:
    class Choosing(Block):
        def forward(self, hidden: Any) -> Any:
            ask(hidden.sum())
            return super().forward(hidden)

    with pytest.raises(UnsupportedModelError, match=r"no plan .* depends on values"):
        adapter_without_memory(Decoder(Choosing).to("meta").eval())


def test_working_set_of_a_llama_by_hand() -> None:
    model = skeleton("llama", inner=64)
    found = dict(working_set(model, get_adapter("llama"), 16))
    assert set(found) == {4, 16}
    assert found[16] == 16 * llama_working(WIDTH, 64, 4)


def test_blocks_that_go_token_by_token_are_not_run_on_long_sequences() -> None:
    found = dict(working_set(skeleton("mamba"), get_adapter("mamba"), 4096))
    assert set(found) == {32, 64}
    assert found[64] == pytest.approx(2 * found[32], rel=0.05)


def test_experts_of_another_type_are_counted_in_the_type_that_runs() -> None:
    from transformers import AutoModelForCausalLM

    config = mixture_of_experts().config
    with torch.device("meta"):
        models = [
            AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
            for dtype in (torch.float32, torch.bfloat16)
        ]
    adapter = adapter_without_memory(models[0])
    single, half = (working_set(model, adapter, 16)[-1][1] for model in models)
    assert single == 2 * half


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapters_are_found_without_memory(family: str) -> None:
    assert adapter_without_memory(skeleton(family)) == adapter_of(tiny_model(family))


def test_experts_are_found_without_memory() -> None:
    from transformers import AutoModelForCausalLM

    model = mixture_of_experts()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config).eval()
    assert adapter_without_memory(empty) == adapter_of(model)


def test_a_model_is_as_it_was_after_a_run_without_memory() -> None:
    model = skeleton("llama", tied=True)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    with without_memory(model):
        assert embedding_rows(model)
        assert model.lm_head.weight is model.get_input_embeddings().weight
        assert not model.lm_head.weight.is_meta
    after = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert after == before


def test_shapes_of_a_model() -> None:
    model = skeleton("llama")
    shapes = {"model.layers.1.mlp.down_proj": (WIDTH, INNER)}
    found = model_shape(model, get_adapter("llama"), shapes, 16)
    assert [block.stages for block in found.blocks] == [
        (),
        (StageShape(INNER, (WIDTH,)),),
    ]
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.head == model.lm_head.weight.numel()
    assert found.hidden == WIDTH
    assert found.itemsize == 4


def test_a_tied_head_is_no_head_of_its_own() -> None:
    model = skeleton("llama", tied=True)
    found = model_shape(model, get_adapter("llama"), {}, 16)
    assert found.head == 0
    assert found.parameters == sum(p.numel() for p in model.parameters())

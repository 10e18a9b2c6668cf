"""Streams: running the blocks one by one is running the model, bit for bit."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.adapters import OutputSlice, Stage
from layerwise.errors import UnsupportedModelError
from layerwise.run.activations.streams import Call, Stream, Tap, capture, visit_inputs
from tests.support.models import (
    FAMILIES,
    VOCABULARY,
    WIDTH,
    WINDOW,
    blocks_of,
    random_tokens,
    recorded_inputs,
    tiny_model,
)

CPU = torch.device("cpu")
SUPPORTED = sorted(FAMILIES)
FINAL_NORMS = (
    "model.decoder.final_layer_norm",
    "model.norm",
    "model.final_layernorm",
    "backbone.norm_f",
    "transformer.ln_f",
    "gpt_neox.final_layer_norm",
)
LENGTH = 3 * WINDOW


def uneven_batches() -> list[Tensor]:
    """Batches with other numbers of sequences and other lengths."""
    return [
        random_tokens(3, LENGTH, 1),
        random_tokens(1, LENGTH, 2),
        random_tokens(2, 5, 3),
    ]


def final_states(model: Any, batches: Sequence[Tensor]) -> list[Tensor]:
    """Hidden states after the last block, before the final norm."""
    names = dict(model.named_modules())
    norm = next(name for name in FINAL_NORMS if name in names)
    with torch.no_grad(), recorded_inputs(model, [norm]) as seen:
        for batch in batches:
            model(batch, use_cache=False)
    return seen[norm]


def run_blocks(stream: Stream, blocks: Sequence[nn.Module]) -> list[Tensor]:
    hidden = list(stream.hidden)
    with torch.no_grad():
        for block, calls in zip(blocks, stream.calls, strict=True):
            pairs = zip(calls, hidden, strict=True)
            hidden = [call.run(block, states, CPU) for call, states in pairs]
    return hidden


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", SUPPORTED)
def test_blocks_one_by_one_give_the_model(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, layers=3, dtype=dtype)
    batches = uneven_batches()
    stream = capture(model, blocks_of(model), batches)
    assert same_bits(run_blocks(stream, blocks_of(model)), final_states(model, batches))


@pytest.mark.parametrize("family", SUPPORTED)
def test_calls_are_captured_before_any_weight_of_a_block_matters(family: str) -> None:
    model, other = tiny_model(family), tiny_model(family)
    for parameter in nn.ModuleList(blocks_of(other)).parameters():
        nn.init.constant_(parameter, 0.5)
    batches = uneven_batches()
    stream = capture(other, blocks_of(other), batches)
    assert same_bits(run_blocks(stream, blocks_of(model)), final_states(model, batches))


def test_every_block_has_its_own_mask() -> None:
    model = tiny_model("qwen2")
    stream = capture(model, blocks_of(model), [random_tokens(1, LENGTH)])
    whole, window = (calls[0].kwargs["attention_mask"] for calls in stream.calls)
    assert window is not None
    last = window.reshape(-1, LENGTH)[-1]
    visible = last if last.dtype == torch.bool else last == 0
    assert int(visible.sum()) == WINDOW
    assert whole is None or not torch.equal(whole, window)


def test_no_cache_is_used() -> None:
    for family in SUPPORTED:
        model = tiny_model(family)
        stream = capture(model, blocks_of(model), uneven_batches())
        for call in (call for calls in stream.calls for call in calls):
            assert not call.kwargs.get("use_cache")
            assert call.kwargs.get("past_key_values") is None


class TupleBlock(nn.Module):
    """Returns (hidden states, something else), as the blocks of older models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, shift: Tensor, *, scale: float) -> tuple[Tensor, str]:
        return hidden + scale * torch.tanh(self.linear(hidden + shift)), "attention"


class TupleModel(nn.Module):
    """A model whose blocks return tuples and take positional arguments, one per block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(TupleBlock() for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        assert not use_cache
        hidden: Tensor = self.embedding(input_ids)
        shift = torch.arange(input_ids.shape[1])[:, None] / 10
        for index, layer in enumerate(self.layers):
            hidden, _ = layer(hidden, shift + index, scale=0.5 + index)
        return hidden


def test_blocks_that_return_tuples() -> None:
    model = TupleModel().eval()
    batches = uneven_batches()
    stream = capture(model, list(model.layers), batches)
    with torch.no_grad():
        expected = [model(batch, use_cache=False) for batch in batches]
    assert same_bits(run_blocks(stream, list(model.layers)), expected)
    assert [calls[0].kwargs["scale"] for calls in stream.calls] == [0.5, 1.5, 2.5]


def test_forward_methods_are_those_of_the_class_again() -> None:
    model = tiny_model("llama")
    capture(model, blocks_of(model), uneven_batches())
    assert all("forward" not in vars(block) for block in blocks_of(model))


class Broken(Exception):
    """Raised inside a forward pass."""


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.0.mlp"])
def test_forward_methods_are_restored_after_an_error(where: str) -> None:
    model = tiny_model("llama")

    def fail(*_: Any) -> None:
        raise Broken

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    with pytest.raises(Broken):
        capture(model, blocks_of(model), uneven_batches())
    handle.remove()
    assert all("forward" not in vars(block) for block in blocks_of(model))


def test_a_forward_method_of_the_instance_is_kept() -> None:
    """Other libraries wrap ``forward`` on the instance; theirs must survive ours."""
    model = tiny_model("llama")
    batches = uneven_batches()
    expected = final_states(model, batches)
    wrapped = []
    for block in blocks_of(model):
        original = block.forward

        def forward(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            return original(*args, **kwargs)

        block.forward = forward
        wrapped.append(forward)
    stream = capture(model, blocks_of(model), batches)
    assert [vars(block).get("forward") for block in blocks_of(model)] == wrapped
    assert same_bits(run_blocks(stream, blocks_of(model)), expected)


def visit(model: Any, names: Sequence[str], *, stop: bool) -> tuple[Any, list[Any]]:
    batches = uneven_batches()
    stream = capture(model, blocks_of(model), batches)
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    taps = [Tap(Stage((name,)), seen[name].append) for name in names]
    outputs = visit_inputs(
        blocks_of(model)[0], taps, stream.calls[0], stream.hidden, CPU, stop=stop
    )
    return seen, list(outputs)


@pytest.mark.parametrize("family", ["opt", "qwen3"])
@pytest.mark.parametrize("stop", [True, False])
def test_visited_inputs_are_those_of_the_model(family: str, stop: bool) -> None:
    model = tiny_model(family)
    names = ["self_attn.q_proj", "fc2" if family == "opt" else "mlp.down_proj"]
    with torch.no_grad(), recorded_inputs(blocks_of(model)[0], names) as expected:
        for batch in uneven_batches():
            model(batch)
    seen, outputs = visit(model, names, stop=stop)
    assert len(outputs) == len(uneven_batches())
    assert all(same_bits(seen[name], expected[name]) for name in names)


def test_the_rest_of_the_block_is_skipped_on_request() -> None:
    model = tiny_model("llama")
    late: list[Any] = []
    blocks_of(model)[0].get_submodule("mlp").register_forward_pre_hook(
        lambda _, args: late.append(args)
    )
    _, outputs = visit(model, ["self_attn.q_proj", "self_attn.o_proj"], stop=True)
    assert outputs == [None] * len(uneven_batches())
    # capture itself runs the first block once, on two tokens
    assert len(late) == 1
    _, outputs = visit(model, ["self_attn.o_proj"], stop=False)
    assert all(isinstance(output, Tensor) for output in outputs)


def test_hooks_are_removed_after_an_error() -> None:
    model = tiny_model("llama")
    stream = capture(model, blocks_of(model), uneven_batches())
    block = blocks_of(model)[0]

    def fail(_: Tensor) -> None:
        raise Broken

    taps = [Tap(Stage(("mlp.up_proj",)), fail)]
    states = visit_inputs(block, taps, stream.calls[0], stream.hidden, CPU, stop=True)
    with pytest.raises(Broken):
        list(states)
    assert not block.get_submodule("mlp.up_proj")._forward_pre_hooks


class Twice(nn.Module):
    """Calls one linear twice and another one never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.twice(self.twice(hidden)) @ self.never.weight.T
        states: Tensor = self.last(inner)
        return states


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("count", ["twice", "never"])
def test_linear_that_is_not_called_once_is_named(count: str, stop: bool) -> None:
    taps = [Tap(Stage((name,)), lambda _: None) for name in (count, "last")]
    calls = [Call((), {})]
    hidden = [torch.ones(1, 3, WIDTH)]
    states = visit_inputs(Twice(), taps, calls, hidden, CPU, "layers.7", stop=stop)
    with pytest.raises(UnsupportedModelError) as caught:
        list(states)
    expected = f"layers.7.{count} is called {count} in a forward pass of its block"
    assert str(caught.value).startswith(expected)
    assert "add it to ignore" in str(caught.value)


@pytest.mark.parametrize("stop", [True, False])
def test_slice_of_an_output_is_as_wide_as_the_linear(stop: bool) -> None:
    block = nn.ModuleDict({"wide": nn.Linear(WIDTH, 3 * WIDTH)})
    block["narrow"] = nn.Linear(WIDTH, 2)  # used without being called
    block.forward = lambda hidden: block["wide"](hidden)
    seen: list[Tensor] = []
    taps = [Tap(Stage(("narrow",), source=OutputSlice("wide")), seen.append)]
    hidden = [torch.arange(2.0 * WIDTH).reshape(1, 2, WIDTH)]
    list(visit_inputs(block, taps, [Call((), {})], hidden, CPU, stop=stop))
    assert torch.equal(seen[0], block["wide"](hidden[0])[..., :WIDTH])
    assert not block["wide"]._forward_hooks

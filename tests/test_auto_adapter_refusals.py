"""Decoders without an adapter of their own: what is refused, and what the message says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.adapters.auto import discover
from layerwise.errors import UnsupportedModelError
from layerwise.run.models.architecture import adapter_of
from tests.support.models import WIDTH, Block, Decoder, mixture_of_experts, random_tokens
from tests.support.pruning import prune


def test_fused_experts_are_named() -> None:
    model = mixture_of_experts()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError) as caught:
        prune(model)
    message = str(caught.value)
    assert "model.layers.0.mlp.experts.gate_up_proj (a parameter of shape (4, 16" in message
    assert "model.layers.0.mlp.experts.down_proj" in message
    assert "4 weights of the blocks, 63.8% of their parameters" in message
    assert "\n" not in message
    entries = message.rpartition("ignore ")[2].split()
    assert all(entry.startswith("re:") for entry in entries)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    prune(model, ignore=entries)  # what the message says, does


@pytest.mark.parametrize(
    "ignore",
    [
        ["re:.*experts.*"],
        ["Qwen3MoeExperts"],
        [f"model.layers.{index}.mlp.experts" for index in range(2)],
    ],
)
def test_experts_are_left_dense_on_request(ignore: list[str]) -> None:
    model = mixture_of_experts()
    report = prune(model, ignore=ignore)
    assert len(report.records) == 2 * 4
    for name, parameter in model.named_parameters():
        if "experts" in name:
            assert bool((parameter != 0).all())


def test_experts_do_not_matter_where_they_are_no_target() -> None:
    assert len(prune(mixture_of_experts(), targets="re:.*q_proj").records) == 2


class Unused(Block):
    def forward(self, hidden: Tensor) -> Any:
        return hidden + torch.tanh(hidden @ self.first.weight.T) + self.second(hidden)


class Repeated(Block):
    def forward(self, hidden: Tensor) -> Any:
        return hidden + self.second(self.first(self.first(hidden)))


class Raw(Block):
    """Holds a large matrix that is not a linear layer, in two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(WIDTH, WIDTH))
        self.router = nn.Parameter(torch.ones(WIDTH, 2))


class Mixed(Block):
    """Holds a matrix of a fifth of the block, smaller than its linears, and a filter."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(WIDTH, WIDTH // 2))
        self.filter = nn.Conv1d(4 * WIDTH, 4 * WIDTH, 4, groups=4 * WIDTH)


class Interrupted(Decoder):
    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(2 * hidden)
        return hidden


class Backwards(Decoder):
    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in reversed(self.layers):
            hidden = layer(hidden)
        return hidden


class Recurrent(Decoder):
    """One list of blocks, run twice, as by models that share all blocks."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in [*self.layers, *self.layers]:
            hidden = layer(hidden)
        return hidden


class TwoLists(Decoder):
    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(Block() for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embedding(input_ids)
        for layer in [*self.layers, *self.others]:
            hidden = layer(hidden)
        return hidden


class Broken(Decoder):
    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        message = "pixel_values\nare missing"
        raise ValueError(message)


@pytest.mark.parametrize(
    ("kind", "name", "reason"),
    [
        (Unused, "first", "called 0 times"),
        (Repeated, "first", "called 2 times"),
        (Raw, "matrix", f"a parameter of shape ({WIDTH}, {WIDTH})"),
        (Mixed, "matrix", f"a parameter of shape ({WIDTH}, {WIDTH // 2})"),
    ],
)
def test_weights_that_cannot_be_served(kind: type[Block], name: str, reason: str) -> None:
    adapter = discover(Decoder(kind), random_tokens(2, 8))
    assert set(adapter.unserved) == {f"layers.{index}.{name}" for index in range(3)}
    assert all(why.startswith(reason) for why in adapter.unserved.values())
    assert all(name not in adapter.linear_names(f"layers.{i}") for i in range(3))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Interrupted(), "layers.1 gives another output when it is run on its own"),
        (Backwards(), "do not run once each and in order, but layers.2, layers.1"),
        (Recurrent(), "do not run once each and in order, but layers.0, layers.1"),
        (TwoLists(), "found: layers (3 blocks), others (3 blocks)"),
        (Decoder(nn.Identity), "found: none in Embedding, ModuleList"),
        (Broken(), "ValueError: pixel_values are missing"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_decoder_that_cannot_be_served(model: nn.Module, expected: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        adapter_of(model.eval())
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_blocks_that_pass_more_than_hidden_states() -> None:
    """A second result that the next block needs is not there when it runs alone."""

    class Passing(Block):
        def forward(self, hidden: Tensor, more: Any = 0) -> Any:
            inner = self.first(hidden) + more
            return hidden + self.second(inner), inner

    class Chained(Decoder):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            hidden, more = self.embedding(input_ids), 0
            for layer in self.layers:
                hidden, more = layer(hidden, more)
            return hidden

    with pytest.raises(UnsupportedModelError, match="cannot be run one by one"):
        adapter_of(Chained(Passing))

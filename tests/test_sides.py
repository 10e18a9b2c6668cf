"""The two halves of a block that is pruned stage by stage: nothing is computed twice."""

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from layerwise.adapters import OutputSlice, Stage
from layerwise.run import capacity
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.pass_through import (
    PassThrough,
    PassThroughFinder,
    enclosing_modules,
)
from layerwise.run.activations.pruned_side import PrunedSide
from layerwise.run.activations.streams import BATCH, Call
from layerwise.run.capacity import STORE, room
from layerwise.run.pipeline import trim, walk
from layerwise.run.pipeline.blocks import advance
from layerwise.run.pipeline.trim import trim_memory
from layerwise.run.prune import prune_model
from tests.support.models import blocks_of, random_tokens, tiny_model

WIDTH, LENGTH = 4, 12
TOKENS = random_tokens(BATCH + 3, LENGTH)  # two batches of unequal size
BATCHES = 2
PROBE = 1  # a pass through the first block shows what blocks return, before the capture
OUT, DOWN = Stage(("attention.o",)), Stage(("down",))


class Named(NamedTuple):
    """What a module returns by name."""

    states: Tensor
    weights: Tensor | None


class Attention(nn.Module):
    """Passes through its last linear, unless `behind` does something with the output."""

    def __init__(self, behind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.o, self.behind = nn.Linear(WIDTH, WIDTH), behind

    def forward(self, states: Tensor) -> Any:
        return self.behind(self.o(states))


class Block(nn.Module):
    """Attention and one more linear."""

    def __init__(self, behind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.attention, self.down = Attention(behind), nn.Linear(WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        output = self.attention(states)
        given = output[0] if isinstance(output, tuple | list) else output
        result: Tensor = self.down(given.add_(states))  # in place, as a block may
        return result


def pass_through_of(block: nn.Module, *batches: Tensor) -> dict[str, PassThrough]:
    finder = PassThroughFinder(block, [OUT, DOWN])
    handles = list(finder.attach())
    for batch in batches or (torch.ones(2, WIDTH),):
        block(batch)
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in block.modules())
    return dict(finder.modules())


@pytest.mark.parametrize(
    ("behind", "others"),
    [
        (lambda states: states, None),
        (lambda states: (states,), 0),
        (lambda states: (states, None), 1),
        (lambda states: (states, None, None), 2),
    ],
    ids=["tensor", "alone", "one none", "two nones"],
)
@torch.no_grad()
def test_modules_that_end_with_a_linear(
    behind: Callable[[Tensor], Any], others: int | None
) -> None:
    found = pass_through_of(Block(behind))
    assert found == {"attention.o": PassThrough("attention", others)}
    states = torch.ones(1)
    given = found["attention.o"].output(states)
    assert given is states or (given[0] is states and len(given) == 1 + (others or 0))


@pytest.mark.parametrize(
    "behind",
    [
        lambda states: states * 1,
        lambda states: (states, states),  # weights of eager attention
        lambda states: [states],
        lambda states: Named(states, None),
        lambda states: states.view_as(states),
        lambda states: states.mul_(2),
    ],
    ids=["another tensor", "more", "list", "named tuple", "view", "in place"],
)
@torch.no_grad()
def test_modules_that_do_something_behind(behind: Callable[[Tensor], Any]) -> None:
    assert pass_through_of(Block(behind)) == {}


def test_inference_mode_does_not_tell() -> None:
    with torch.inference_mode():
        assert pass_through_of(Block(lambda states: states), torch.ones(2, WIDTH)) == {}


@torch.no_grad()
def test_a_module_that_ends_so_for_some_inputs_only() -> None:
    block = Block(lambda states: states if len(states) == 2 else states + 1)
    two, three = torch.ones(2, WIDTH), torch.ones(3, WIDTH)
    assert list(pass_through_of(block, two, two)) == ["attention.o"]
    for batches in ((two, three), (three, two)):
        assert pass_through_of(block, *batches) == {}


def test_which_modules_may_end_with_a_stage() -> None:
    def around(*linears: str, index: int = 0, **options: Any) -> list[str]:
        stages = [Stage((name,), **options) for name in linears]
        return enclosing_modules(stages, index)

    assert around("a.b.c", "d") == ["a", "a.b"]
    assert around("a.b.c", "a.d") == ["a.b"]
    assert around("a.b.c", "a.b.d") == []
    assert around("a.b.c", "a.bc") == ["a.b"]
    assert around("c", "d") == []
    assert around("d", "a.b.c", index=1) == []  # the last
    assert around("a.b", "d", source=OutputSlice("a.x")) == []
    assert enclosing_modules([Stage(("a.b", "a.c")), Stage(("d",))], 0) == []


@contextmanager
def counted(owner: Any, name: str) -> Iterator[list[None]]:
    """Calls of a function of a module or a class."""
    calls: list[None] = []
    original = getattr(owner, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, count)
        yield calls


def pruned(model: Any, mode: Any, **options: Any) -> Any:
    return prune_model(
        model,
        options.pop("method", "sparsegpt"),
        sparsity=0.3,
        calibration=TOKENS,
        n_sequences=len(TOKENS),
        sequence_length=LENGTH,
        error_correction=mode,
        **options,
    )


@pytest.mark.parametrize(
    ("mode", "store", "passes"),
    [
        # dense, and pruned in front of o, in every block; full: pruned to the end as well
        ("block", STORE, 2 + 2 + 2),
        ("full", STORE, 3 + 3 + 2),
        # dense to the end, dense for o, gate, down, and pruned for those
        ("block", 0, 7 + 7 + 6),
        ("full", 0, 8 + 8 + 6),
    ],
)
def test_attention_is_computed_as_often_as_it_changes(
    monkeypatch: pytest.MonkeyPatch, mode: str, store: int, passes: int
) -> None:
    monkeypatch.setattr(capacity, "STORE", store)
    model = tiny_model("llama", layers=3)
    with counted(nn.functional, "scaled_dot_product_attention") as calls:
        pruned(model, mode)
    assert len(calls) == PROBE + BATCHES * passes


@pytest.mark.parametrize("family", ["opt", "llama", "qwen3", "gpt2", "mamba"])
@pytest.mark.parametrize("mode", ["block", "full"])
def test_what_is_kept_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, family: str, mode: str
) -> None:
    found = []
    for store in (0, STORE):
        monkeypatch.setattr(capacity, "STORE", store)
        model = tiny_model(family, layers=2)
        pruned(model, mode)
        assert not any("forward" in vars(module) for module in model.modules())
        found.append(model.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_eager_attention_is_computed_again() -> None:
    """It returns its weights as well, so it is not a pass-through module."""
    model = tiny_model("llama", layers=1)
    model.set_attn_implementation("eager")
    with counted(type(blocks_of(model)[0].self_attn), "forward") as calls:
        pruned(model, "block")
    assert len(calls) == PROBE + BATCHES * (1 + 3)


@torch.no_grad()
def test_what_is_settled_is_replayed() -> None:
    """Batch by batch, again and again, also if the block continues in place."""
    block, hidden = Block(lambda states: (states, None)), list(torch.randn(3, 2, WIDTH))
    calls = [Call((), {})] * 3
    inputs = BlockInputs("block", block, (OUT, DOWN), calls, hidden, hidden)
    device = torch.device("cpu")
    dense = DenseSide(inputs, inputs.stages, device)
    given = list(dense.advance())
    assert all(map(torch.equal, given, map(block, hidden)))
    assert all(map(torch.equal, dense.inputs_of(OUT), hidden))
    sides = [PrunedSide(inputs, device, dense), PrunedSide(inputs, device)]
    for side in sides:
        assert all(map(torch.equal, side.inputs_of(OUT), hidden))
    block.attention.o.weight.mul_(0.5)
    expected = [block.attention.o(states).add_(states) for states in hidden]
    for side, again in zip(sides, (0, 3), strict=True):
        side.settle(OUT)
        for _ in range(2):
            with counted(Attention, "forward") as made:
                assert all(map(torch.equal, side.inputs_of(DOWN), expected))
            assert len(made) == again
    assert "forward" not in vars(block.attention)


@pytest.mark.parametrize(
    ("free", "cached", "expected"), [(130, 14, 18), (1, 1, 1)], ids=["large", "small"]
)
def test_there_is_more_room_on_an_accelerator(
    monkeypatch: pytest.MonkeyPatch, free: int, cached: int, expected: int
) -> None:
    """An eighth of the free memory, with PyTorch's cache, but no less than on the host."""
    gib, own = 1 << 30, 2
    told = {
        "mem_get_info": (free * gib, 200 * gib),
        "memory_reserved": (own + cached) * gib,
        "memory_allocated": own * gib,
    }
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert room(torch.device("cuda")) == expected * gib
    assert room(torch.device("cpu")) == STORE == gib


def test_a_block_is_copied_only_where_passes_are_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for store, copies in ((0, 2), (STORE, 0)):
        monkeypatch.setattr(capacity, "STORE", store)
        model = tiny_model("llama", layers=2)
        with counted(copy, "deepcopy") as copied:
            pruned(model, "block")
        assert len(copied) == copies


@pytest.mark.parametrize(("family", "method"), [("llama", "sparsegpt"), ("mamba", "fasp")])
def test_nothing_is_kept_behind_the_block(
    monkeypatch: pytest.MonkeyPatch, family: str, method: str
) -> None:
    """Inputs that were kept are gone when the pruned stream moves on."""
    sides: list[weakref.ref[DenseSide]] = []
    alive: list[int] = []
    original = DenseSide.__init__

    def make(side: DenseSide, *args: Any) -> None:
        original(side, *args)
        sides.append(weakref.ref(side))

    def count(task: Any, inputs: Any, hidden: Any) -> Any:
        known = [one() for one in sides]
        alive.append(sum(bool(one._stored) for one in known if one is not None))
        return advance(task, inputs, hidden)

    monkeypatch.setattr(DenseSide, "__init__", make)
    monkeypatch.setattr(walk, "advance", count)
    pruned(tiny_model(family, layers=3), "full", method=method)
    assert len(sides) == 3
    assert alive == [0, 0]


@pytest.mark.parametrize(("width", "times"), [(724, 0), (725, 1)])
def test_memory_is_given_back_behind_large_grams(
    monkeypatch: pytest.MonkeyPatch, width: int, times: int
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(trim, "_malloc_trim", lambda: calls.append)
    trim_memory(width)
    assert len(calls) == times

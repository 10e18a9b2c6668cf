"""Hidden states between the blocks: captured once, then passed through block by block.

The model itself decides how a block is called (masks, rotary embeddings, position ids).
Its forward pass is run once with a recorder in place of every block, so no weight of a
block is used and every keyword is kept, per block. A block may return a tensor, a tuple or
a list; the hidden states come first in all of them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwise.adapters import Stage
from layerwise.adapters.linear import matrix
from layerwise.errors import UnsupportedModelError
from layerwise.run.steps import counted

BATCH = 8  # sequences per forward pass
Visit = Callable[[Tensor], None]


class _Captured(Exception):
    """Ends a forward pass once everything needed has been seen."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a block on one batch, without the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor, device: torch.device) -> Tensor:
        """Output of the block, on the device of `hidden`."""
        output = block(
            hidden.to(device), *_move(self.args, device), **_move(self.kwargs, device)
        )
        states: Tensor = output[0] if isinstance(output, tuple | list) else output
        return states.to(hidden.device)


@torch.no_grad()
def block_outputs(
    block: nn.Module, calls: Sequence[Call], hidden: Sequence[Tensor], device: torch.device
) -> Iterator[Tensor]:
    """Output of a block with its current weights, batch by batch."""
    for call, states in zip(calls, hidden, strict=True):
        yield call.run(block, states, device)


@dataclass(frozen=True)
class Stream:
    """Inputs of the first block, and the calls of every block, batch by batch."""

    hidden: list[Tensor]  # per batch: (sequences, length, width)
    calls: list[list[Call]]  # per block, per batch


@torch.no_grad()
def capture(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Tensor]
) -> Stream:
    """Run everything around the blocks, such as the embeddings, on token batches.

    Parameters
    ----------
    model
        A causal language model in evaluation mode.
    blocks
        Its decoder blocks, in order.
    batches
        Token ids, each (sequences, length).
    """
    others = _other_outputs(model, blocks[0], batches[0][:1, :2])
    stream = Stream([], [[] for _ in blocks])

    def recorder(index: int) -> Callable[..., Any]:
        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                stream.hidden.append(hidden_states)
            stream.calls[index].append(Call(args, kwargs))
            if index == len(blocks) - 1:
                raise _Captured
            return hidden_states if others is None else (hidden_states, *others)

        return record

    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            stack.enter_context(replaced_forward(block, recorder(index)))
        count = len(batches)
        for batch in counted(batches, count, f"embedding {count} batches of tokens"):
            _run_until_captured(model, batch)
    return stream


@contextmanager
def starting_at(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    index: int,
    tokens: Tensor,
    hidden: Sequence[Tensor],
) -> Iterator[None]:
    """Let passes of the model begin at a block; those before it do not run.

    Parameters
    ----------
    model, blocks
        The model and its decoder blocks.
    index
        The first block that runs.
    tokens
        Some token ids, (sequences, length), to see what a block returns.
    hidden
        Inputs of that block, by the order of the passes.
    """
    if index == 0:
        yield
        return
    others, inputs = _other_outputs(model, blocks[0], tokens[:1, :2]), iter(hidden)

    def known(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
        states = next(inputs).to(hidden_states.device)
        return states if others is None else (states, *others)

    def ignored(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
        return hidden_states if others is None else (hidden_states, *others)

    with ExitStack() as stack:
        for block in blocks[: index - 1]:
            stack.enter_context(replaced_forward(block, ignored))
        stack.enter_context(replaced_forward(blocks[index - 1], known))
        yield


def _other_outputs(
    model: nn.Module, block: nn.Module, tokens: Tensor
) -> tuple[None, ...] | None:
    """Stand-ins for the values after the hidden states; None if it returns no tuple."""
    original: Callable[..., Any] = block.forward
    seen: list[tuple[None, ...] | None] = []

    def probe(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        several = isinstance(output, tuple | list)
        seen.append((None,) * (len(output) - 1) if several else None)
        raise _Captured

    with replaced_forward(block, probe):
        _run_until_captured(model, tokens)
    return seen[0]


def _run_until_captured(model: nn.Module, tokens: Tensor) -> None:
    device = next(p.device for p in model.parameters() if not p.is_meta)
    try:
        model(input_ids=tokens.to(device), use_cache=False)
    except _Captured:
        return


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward of a module inside the context."""
    wrapped = vars(module).get("forward")  # set by other libraries on the instance
    module.forward = forward
    try:
        yield
    finally:
        if wrapped is None:
            del module.forward  # the method of the class is visible again
        else:
            module.forward = wrapped


@dataclass(frozen=True)
class Tap:
    """A stage whose inputs are visited, and the function that visits them."""

    stage: Stage
    visit: Visit  # called with the inputs of one batch, shape (..., in)

    @property
    def name(self) -> str:
        """Name of the first linear, relative to the block."""
        return self.stage.linears[0]

    def attach(self, block: nn.Module, visit: Visit) -> RemovableHandle:
        """Hook the block; `visit` may end the forward pass with an exception."""
        linear, source = block.get_submodule(self.name), self.stage.source
        if source is None:

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
                visit(args[0] if args else next(iter(kwargs.values())))

            return linear.register_forward_pre_hook(before, with_kwargs=True)
        width = matrix(linear).shape[1]

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            visit(output[..., :width])

        return block.get_submodule(source.module).register_forward_hook(after)


@torch.no_grad()
def visit_inputs(
    block: nn.Module,
    taps: Sequence[Tap],
    calls: Sequence[Call],
    hidden: Sequence[Tensor],
    device: torch.device,
    block_name: str = "block",
    *,
    stop: bool,
) -> Iterator[Tensor | None]:
    """Run a block batch by batch and visit the inputs of some of its linears.

    Parameters
    ----------
    block
        The block, on `device`.
    taps
        Stages to visit.
    calls, hidden
        Calls of the block, and its inputs, per batch.
    device
        Device of the computation.
    block_name
        Full name of the block, for messages.
    stop
        Whether to stop a batch when all inputs have been seen, which saves the rest of
        the block; otherwise the output of the block is yielded.

    Raises
    ------
    UnsupportedModelError
        If a linear is not called exactly once in a forward pass of the block: its inputs
        would be missing or incomplete.
    """
    pending: set[str] = set()

    def once(tap: Tap) -> Visit:
        def look(inputs: Tensor) -> None:
            if tap.name not in pending:
                raise UnsupportedModelError(_not_once(block_name, tap.name, "twice"))
            tap.visit(inputs)
            pending.discard(tap.name)
            if stop and not pending:
                raise _Captured

        return look

    with ExitStack() as stack:
        for tap in taps:
            stack.callback(tap.attach(block, once(tap)).remove)
        for call, states in zip(calls, hidden, strict=True):
            pending.update(tap.name for tap in taps)
            output: Tensor | None = None
            with suppress(_Captured):
                output = call.run(block, states, device)
            if pending:
                name = next(tap.name for tap in taps if tap.name in pending)
                raise UnsupportedModelError(_not_once(block_name, name, "never"))
            yield output


def _not_once(block_name: str, name: str, count: str) -> str:
    return (
        f"{block_name}.{name} is called {count} in a forward pass of its block, so its "
        f"inputs are unknown; add it to ignore"
    )


def _move(value: Any, device: torch.device) -> Any:
    """Move tensors inside tuples, lists and mappings to the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_move(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _move(item, device) for key, item in value.items()}
    return value


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation inside the context; then restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

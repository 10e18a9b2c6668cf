"""Activations between the blocks: captured once, then advanced block by block.

The model itself decides what a block is called with (masks, rotary embeddings, position
ids): its forward pass is run once with every block replaced by a recorder, so no weight
of a block is used and every keyword is kept, per block. A block may return a tensor or a
tuple; the hidden states come first in both.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Visit = Callable[[Tensor], None]


class _Captured(Exception):
    """Ends a forward pass once everything wanted has been seen."""


@dataclass(frozen=True)
class Call:
    """How the model calls one block on one batch, the hidden states left out."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor, device: torch.device) -> Tensor:
        """Hidden states after the block, on the device of `hidden`."""
        output = block(
            hidden.to(device), *_move(self.args, device), **_move(self.kwargs, device)
        )
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states.to(hidden.device)


@dataclass(frozen=True)
class Stream:
    """Inputs of the first block, and the calls of every block, batch by batch."""

    hidden: list[Tensor]  # per batch: (sequences, length, width)
    calls: list[list[Call]]  # per block, per batch


@torch.no_grad()
def capture(
    model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Tensor]
) -> Stream:
    """Run embeddings and everything else around the blocks on token batches.

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
            stack.enter_context(_replaced_forward(block, recorder(index)))
        for batch in batches:
            _run_until_captured(model, batch)
    return stream


def _other_outputs(
    model: nn.Module, block: nn.Module, tokens: Tensor
) -> tuple[None, ...] | None:
    """Stand-ins for what a block returns behind its hidden states; None: no tuple."""
    original: Callable[..., Any] = block.forward
    seen: list[tuple[None, ...] | None] = []

    def probe(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        seen.append((None,) * (len(output) - 1) if isinstance(output, tuple) else None)
        raise _Captured

    with _replaced_forward(block, probe):
        _run_until_captured(model, tokens)
    return seen[0]


def _run_until_captured(model: nn.Module, tokens: Tensor) -> None:
    device = next(model.parameters()).device
    try:
        model(input_ids=tokens.to(device), use_cache=False)
    except _Captured:
        return


@contextmanager
def _replaced_forward(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    wrapped = vars(block).get("forward")  # by other libraries, on the instance
    block.forward = forward
    try:
        yield
    finally:
        if wrapped is None:
            del block.forward  # the method of the class shows again
        else:
            block.forward = wrapped


@torch.no_grad()
def visit_inputs(
    block: nn.Module,
    linears: Mapping[str, Visit],
    calls: Sequence[Call],
    hidden: Sequence[Tensor],
    device: torch.device,
    *,
    stop: bool,
) -> Iterator[Tensor | None]:
    """Run a block batch by batch and show the inputs of some of its linears.

    Parameters
    ----------
    block
        The block, on `device`.
    linears
        For each linear (name relative to the block) a function of its inputs.
    calls, hidden
        How to call the block, and its input, per batch.
    device
        Where to compute.
    stop
        Whether to stop a batch when all linears have been seen, which saves the rest of
        the block; otherwise the block's output is yielded.
    """
    pending: set[str] = set()

    def hook(name: str, visit: Visit) -> Callable[..., None]:
        def look(
            module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
        ) -> None:
            visit(args[0] if args else kwargs["input"])
            pending.discard(name)
            if stop and not pending:
                raise _Captured

        return look

    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            hook(name, visit), with_kwargs=True
        )
        for name, visit in linears.items()
    ]
    try:
        for call, states in zip(calls, hidden, strict=True):
            pending.update(linears)
            try:
                yield call.run(block, states, device)
            except _Captured:
                yield None
    finally:
        for handle in handles:
            handle.remove()


def _move(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and mappings, on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_move(item, device) for item in value)
    if isinstance(value, Mapping):
        return {key: _move(item, device) for key, item in value.items()}
    return value

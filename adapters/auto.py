"""The adapter of any other decoder, found by running the model once on a few tokens.

The decoder blocks are the longest list of modules that hold linear layers and run one
after the other. Inside a block, linears that receive the same tensor object form a stage,
and stages are ordered by their first call. Blocks may differ: each has its own stages.

Weights that cannot be pruned are reported, never skipped: linears that are not called
exactly once, and matrices outside linear layers, such as the fused experts of a mixture.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters.base import Adapter, Stage
from layerwise.adapters.linear import is_linear
from layerwise.adapters.untouched import Untouched
from layerwise.errors import UnsupportedModelError

SHARE = 0.05  # of a block: a matrix of this size is not left dense without a word


@dataclass
class _Trace:
    """Calls of blocks and linears in one forward pass, in order."""

    blocks: list[str] = field(default_factory=list)  # full names
    calls: list[tuple[str, Tensor, int]] = field(default_factory=list)
    # per call of a linear: its full name, its input, the version of the input; the
    # tensors stay alive, so that no two of them have the same id()
    written: dict[str, str] = field(default_factory=dict)
    # arguments that a block writes to, with the first such block


def discover(model: nn.Module, tokens: Tensor) -> Adapter:
    """Declaration of a model, derived from one forward pass.

    Parameters
    ----------
    model
        A decoder in evaluation mode.
    tokens
        Token ids, shape (sequences, length).

    Raises
    ------
    UnsupportedModelError
        If there is no single list of decoder blocks, or the model cannot be run.
    """
    lists = lists_of_blocks(model)
    trace = _run(model, lists, tokens)
    name = _decoder(model, lists, trace)
    _refuse_sharing(model, trace)
    by_block: dict[str, tuple[Stage, ...]] = {}
    unserved: dict[str, str] = {}
    for index, block in enumerate(lists[name]):
        block_name = f"{name}.{index}"
        calls = [call for call in trace.calls if call[0].startswith(f"{block_name}.")]
        counts = Counter(linear for linear, _, _ in calls)
        linears = {f"{block_name}.{n}": m for n, m in _linears(block)}
        for linear in linears:
            if counts[linear] != 1:
                unserved[linear] = f"called {counts[linear]} times in a forward pass"
        by_block[block_name] = _stages(block_name, calls, unserved)
        unserved |= _large_parameters(block_name, block, linears)
    return Adapter(type(model).__name__, name, (), by_block, unserved, found=True)


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, inner in module.named_modules():
        if is_linear(inner):
            yield name, inner


def lists_of_blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Module lists that contain linears, without lists nested in other lists."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{other}.") for other in lists)
        if isinstance(module, nn.ModuleList) and not nested and any(_linears(module)):
            lists[name] = module
    return lists


@torch.no_grad()
def _run(model: nn.Module, lists: Mapping[str, nn.ModuleList], tokens: Tensor) -> _Trace:
    trace = _Trace()
    with ExitStack() as stack:
        for name, blocks in lists.items():
            for index, block in enumerate(blocks):
                _watch_block(stack, trace, f"{name}.{index}", block)
        try:
            with Untouched(model):
                model(input_ids=tokens, use_cache=False)
        except UnsupportedModelError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            message = (
                f"this {type(model).__name__} cannot be run on token ids alone "
                f"({type(error).__name__}: {reason}); it needs an adapter of its own"
            )
            raise UnsupportedModelError(message) from error
    return trace


def _watch_block(stack: ExitStack, trace: _Trace, name: str, block: nn.Module) -> None:
    sizes: dict[str, int] = {}

    def enter(_: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        trace.blocks.append(name)
        sizes.update(
            {key: len(v) for key, v in kwargs.items() if isinstance(v, MutableMapping)}
        )

    def leave(_: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        for key, size in sizes.items():
            if len(kwargs[key]) > size:
                trace.written.setdefault(key, name)

    def call(linear: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            trace.calls.append((linear, inputs, inputs._version))

        return note

    stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(block.register_forward_hook(leave, with_kwargs=True).remove)
    for linear, module in _linears(block):
        hook = call(f"{name}.{linear}")
        stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _decoder(model: nn.Module, lists: Mapping[str, nn.ModuleList], trace: _Trace) -> str:
    """Name of the longest list of blocks that ran."""
    ran = {
        name: [block for block in trace.blocks if block.startswith(f"{name}.")]
        for name in lists
    }
    sizes = {name: len(lists[name]) for name, blocks in ran.items() if blocks}
    longest = [name for name, size in sizes.items() if size == max(sizes.values())]
    if len(longest) != 1:
        kinds = ", ".join(sorted({type(m).__name__ for _, m in model.named_children()}))
        found = ", ".join(f"{name} ({size} blocks)" for name, size in sizes.items())
        message = (
            f"this {type(model).__name__} has no single list of decoder blocks with linear "
            f"layers, so it needs an adapter of its own; found: "
            f"{found or f'none in {kinds or type(model).__name__}'}"
        )
        raise UnsupportedModelError(message)
    name = longest[0]
    if ran[name] != [f"{name}.{index}" for index in range(sizes[name])]:
        idle = [f"{name}.{i}" for i in range(sizes[name]) if f"{name}.{i}" not in ran[name]]
        text = f", and {_shortened(idle)} not at all on text alone" if idle else ""
        message = (
            f"the blocks of {name} do not run once each and in order, but "
            f"{_shortened(ran[name])}{text}; this model needs an adapter of its own"
        )
        raise UnsupportedModelError(message)
    return name


def _refuse_sharing(model: nn.Module, trace: _Trace) -> None:
    """Refuse a model whose blocks read more of earlier blocks than the hidden states."""
    if not trace.written:
        return
    argument, block = next(iter(trace.written.items()))
    message = (
        f"the blocks of this {type(model).__name__} share more than hidden states: {block} "
        f"writes keys and values or other states into {argument!r}, which later blocks "
        f"read, so no block can be run on its own; choose a model without such sharing"
    )
    raise UnsupportedModelError(message)


def _shortened(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _stages(
    block_name: str,
    calls: Sequence[tuple[str, Tensor, int]],
    unserved: Mapping[str, str],
) -> tuple[Stage, ...]:
    """Linears grouped by their input tensor, in the order of first calls."""
    groups: dict[tuple[int, int], list[str]] = {}
    for linear, inputs, version in calls:
        if linear not in unserved:
            name = linear.removeprefix(f"{block_name}.")
            groups.setdefault((id(inputs), version), []).append(name)
    return tuple(Stage(tuple(names)) for names in groups.values())


def _large_parameters(
    block_name: str, block: nn.Module, linears: Mapping[str, nn.Module]
) -> dict[str, str]:
    """Large matrices outside linear layers.

    They are at least as large as the block's smallest linear, or as a twentieth of the
    block. Routers and state matrices are smaller and stay dense, as norms do; so do
    depthwise filters of any size, which join no channels.
    """
    own = {f"{name}.weight": module for name, module in linears.items()}
    sizes = [module.get_parameter("weight").numel() for module in linears.values()]
    whole = sum(parameter.numel() for parameter in block.parameters())
    least = min([*sizes, whole * SHARE])
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv1d) and module.weight.shape[1] == 1:
            own[f"{block_name}.{name}.weight"] = module
    return {
        name: f"a parameter of shape {tuple(parameter.shape)} outside linear layers"
        for short, parameter in block.named_parameters()
        if (name := f"{block_name}.{short}") not in own
        and parameter.dim() > 1
        and parameter.numel() >= least
    }

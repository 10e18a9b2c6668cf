"""Dry run of a model: its blocks, and the memory that a pass through them needs.

Parameters are tensors with a shape and without storage, so a model of any size can be run.
Such a run gives shapes and no values. The bytes that are alive inside a block are counted
tensor by tensor after every operation, as on a CPU.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.adapters import ADAPTERS, Adapter, get_adapter
from layerwise.adapters.auto import discover
from layerwise.errors import UnsupportedModelError
from layerwise.run.activations.streams import capture, evaluation_mode
from layerwise.run.models.architecture import not_one_by_one

PROBE = (2, 8)  # sequences, tokens of each
LOGGER = logging.getLogger(FakeTensorMode.__module__)
DEPEND_ON_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
LENGTHS = (32, 64)  # two passes show whether the operations grow with the length


@contextmanager
def without_memory(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Let a model run, and create tensors without storage, inside the context.

    Parameters
    ----------
    model
        A model on the meta device.
    dtype
        Type of its parameters inside the context; by default their own.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, nn.Parameter] = {}  # by identity: tied parameters stay tied
    with mode:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=dtype or parameter.dtype)
                    made[id(parameter)] = nn.Parameter(empty, parameter.is_floating_point())
                swapped.append((module._parameters, name, parameter))
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    swapped.append((module._buffers, name, buffer))
        for holder, name, tensor in swapped:
            holder[name] = made.get(id(tensor))
            if holder[name] is None:
                holder[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        try:
            yield
        finally:
            for holder, name, tensor in swapped:
                holder[name] = tensor


def adapter_without_memory(model: Any) -> Adapter:
    """Declared adapter of a model on the meta device, or one found by running the model.

    A run proves an adapter that was found. That is impossible here: there are no values.

    Raises
    ------
    UnsupportedModelError
        If the model has no declared adapter and none can be found.
    """
    model_type = str(getattr(model.config, "model_type", ""))
    if model_type in ADAPTERS:
        return get_adapter(model_type)
    # every architecture has kernels for this type
    try:
        with without_memory(model, torch.bfloat16), evaluation_mode(model):
            return discover(model, torch.zeros(PROBE, dtype=torch.long))
    except UnsupportedModelError as error:
        if not isinstance(error.__cause__, DEPEND_ON_VALUES):
            raise
        message = (
            f"no plan of a {type(model).__name__} can be made: its forward pass depends on "
            f"values, which a plan does not compute; prune it without a plan"
        )
        raise UnsupportedModelError(message) from error


def working_set(model: Any, adapter: Adapter, length: int) -> tuple[tuple[int, float], ...]:
    """Bytes that one sequence needs inside a block, at a few lengths up to the given one.

    The largest value of all different blocks, for a pass to the end of the block. The
    output of the block is counted, its input is not. Blocks that process a sequence token
    by token are run on short sequences only: their memory is proportional to the length.

    Raises
    ------
    UnsupportedModelError
        If the blocks cannot be run one by one.
    """
    try:
        with _quiet():
            return _working_set(model, adapter, length, model.dtype)
    except RuntimeError:  # experts have kernels for one type only
        share = model.dtype.itemsize / torch.bfloat16.itemsize
        sizes = _working_set(model, adapter, length, torch.bfloat16)
        return tuple((at, share * size) for at, size in sizes)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise not_one_by_one(model, error) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Let torch print no traceback of an operation without a kernel."""
    before, LOGGER.disabled = LOGGER.disabled, True
    try:
        yield
    finally:
        LOGGER.disabled = before


def _working_set(
    model: Any, adapter: Adapter, length: int, dtype: torch.dtype
) -> tuple[tuple[int, float], ...]:
    lengths = sorted({*(min(n, length) for n in LENGTHS), -(-length // 4), length})
    blocks = list(adapter.blocks_of(model).values())
    kinds: dict[Any, int] = {}  # shapes of a block -> its first index
    for index, block in enumerate(blocks):
        shapes = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
        kinds.setdefault((type(block), shapes), index)
    peaks: dict[int, float] = {}
    counts: set[int] = set()
    with without_memory(model, dtype), evaluation_mode(model), torch.no_grad():
        batches = [torch.zeros(1, n, dtype=torch.long) for n in lengths]
        stream = capture(model, blocks, batches)
        for number, (n, hidden) in enumerate(zip(lengths, stream.hidden, strict=True)):
            for index in kinds.values():
                with LiveBytes() as live:
                    stream.calls[index][number].run(blocks[index], hidden, hidden.device)
                peaks[n] = max(peaks.get(n, 0.0), live.peak)
                counts.add(live.operations)
            if len(counts) > len(kinds) and n >= LENGTHS[-1]:
                break  # token by token
    return tuple(peaks.items())


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that tracks the storages created by the operations inside it.

    Attributes
    ----------
    peak
        Largest number of bytes that were alive at one time.
    operations
        Number of operations so far.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.operations = 0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        known = {_storage(t) for t in _tensors((args, list((kwargs or {}).values())))}
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in _tensors(result):
            if (key := _storage(tensor)) not in known:
                storage = tensor.untyped_storage()
                self._alive[key] = _reference(storage), storage.nbytes()
        alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self._alive = alive
        self.peak = max(self.peak, sum(size for _, size in alive.values()))
        return result


def _reference(storage: Any) -> Any:
    """Weak reference that shows when a storage is freed."""
    make: Any = StorageWeakRef
    return make(storage)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)

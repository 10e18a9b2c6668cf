"""Operations and bytes of running code, counted from its tensors.

The context intercepts every PyTorch operation with its tensors. It counts matrix products,
Cholesky factorizations, triangular solves and inverses, in the type of their operands. It
also counts the bytes of all inputs and outputs, as if nothing stayed in a cache.
Eigenvalues and kernels of other libraries are not counted.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.timing.floor import Work

aten = torch.ops.aten


def _product(left: Tensor, right: Tensor) -> float:
    return 2.0 * left.numel() * right.shape[-1]


def _cubic(share: float) -> Callable[..., float]:
    return lambda matrix, *_: share * matrix.numel() * matrix.shape[-1]


FLOPS: Mapping[Any, Callable[..., float]] = MappingProxyType(
    {
        aten.mm: lambda left, right, *_: _product(left, right),
        aten.bmm: lambda left, right, *_: _product(left, right),
        aten.addmm: lambda _, left, right, *__: _product(left, right),
        aten.addmm_: lambda _, left, right, *__: _product(left, right),
        aten.baddbmm: lambda _, left, right, *__: _product(left, right),
        aten.linalg_cholesky_ex: _cubic(1 / 3),
        aten.cholesky_inverse: _cubic(2 / 3),
        aten.cholesky_solve: lambda sides, lower, *_: 2.0 * sides.numel() * lower.shape[-1],
        aten.linalg_solve_triangular: lambda matrix, sides, *_: (
            1.0 * sides.numel() * matrix.shape[-1]
        ),
    }
)
UNTOUCHED = frozenset(
    {
        *(aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided),
        *(aten.resize_, aten._unsafe_view),
    }
)


class OperationCount:
    """Context that counts: ``with OperationCount() as count: ...``, then ``count.work``."""

    def __init__(self) -> None:
        self._flops: dict[torch.dtype, float] = {}
        self._bytes = 0.0
        self._mode = _Mode(self._add)

    @property
    def work(self) -> Work:
        """Work counted so far."""
        return Work(dict(self._flops), self._bytes)

    def __enter__(self) -> "OperationCount":
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def _add(self, operation: Any, args: Any, read: Any, written: Any) -> None:
        packet = operation.overloadpacket
        if operation.is_view or packet in UNTOUCHED:
            return
        if packet in FLOPS:
            dtype = next(_tensors(args)).dtype
            if packet in (aten.addmm, aten.addmm_, aten.baddbmm):
                dtype = args[1].dtype
            self._flops[dtype] = self._flops.get(dtype, 0.0) + FLOPS[packet](*args)
        self._bytes += sum(tensor.nbytes for tensor in _tensors((read, written)))


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, add: Callable[[Any, Any, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._add = add

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [value for name, value in kwargs.items() if name != "out"]
        self._add(func, args, (args, read), result)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)

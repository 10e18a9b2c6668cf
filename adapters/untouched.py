"""A context in which a model cannot change its own parameters.

The forward pass of some models rescales weights in place. Such a model would come back
changed from a run that refuses it.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.errors import UnsupportedModelError


class Untouched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise an error before an operation writes to a parameter of a model.

    Parameters
    ----------
    model
        The model that runs inside the context.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kind = type(model).__name__
        self._names = {_storage(p): name for name, p in model.named_parameters()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = zip(func._schema.arguments, args, strict=False)
        written = [value for argument, value in arguments if argument.is_write]
        for value in (*written, kwargs.get("out")):
            name = self._names.get(_storage(value)) if isinstance(value, Tensor) else None
            if name is not None:
                message = (
                    f"this {self._kind} changes {name} in its forward pass, so its blocks "
                    f"cannot be run one by one: it needs an adapter of its own"
                )
                raise UnsupportedModelError(message)
        return func(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)

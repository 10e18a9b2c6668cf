"""Tensors as users have them: what is taken, and what is refused in one line."""

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError

Array = Tensor | np.ndarray[Any, Any]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def real_tensor(value: Any, name: str) -> Tensor:
    """Tensor of real numbers from a dense tensor or an array of numpy, without gradients.

    Parameters
    ----------
    value
        Anything; float64, float32, bfloat16 and float16 are taken.
    name
        Name of the argument, for the message.

    Raises
    ------
    InvalidProblemError
        If it is anything else: a list, a sparse, quantized or meta tensor, other types.
    """
    return tensor_of(value, name, FLOATS, "float64, float32, bfloat16 or float16")


def tensor_of(value: Any, name: str, types: Collection[torch.dtype], wanted: str) -> Tensor:
    """Dense tensor of one of some types, from a tensor or an array of numpy (copied)."""
    if isinstance(value, np.ndarray):
        value = _from_numpy(value)
    if not isinstance(value, Tensor):
        kind = f"{value.dtype} array" if isinstance(value, np.ndarray) else _name(value)
        message = f"{name} must be a tensor or numpy array of {wanted}, got {kind}"
        raise InvalidProblemError(message)
    if value.is_meta:
        message = f"{name} is on the meta device and has no numbers: load it first"
        raise InvalidProblemError(message)
    if value.layout is not torch.strided or value.is_quantized or value.dtype not in types:
        sparse = value.layout is not torch.strided
        kind = f"{value.dtype}".removeprefix("torch.") + (", sparse" if sparse else "")
        message = f"{name} must be a dense tensor of {wanted}, got {kind}: convert it"
        raise InvalidProblemError(message)
    return value.detach() if value.requires_grad else value


def _from_numpy(array: np.ndarray[Any, Any]) -> Any:
    """Tensor with a copy of the numbers; the array itself if torch has no such type."""
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(native)
    except TypeError:
        return array


def check_real(value: Any, name: str) -> None:
    """Raise unless it is a real number (and not a bool, text or tensor)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        message = f"{name} must be a number, got {_shown(value)}"
        raise InvalidProblemError(message)


def check_integer(value: Any, name: str) -> None:
    """Raise unless it is an integer (and not a bool, text or tensor)."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        message = f"{name} must be an integer, got {_shown(value)}"
        raise InvalidProblemError(message)


def _shown(value: Any) -> str:
    """A number or text as it is, of anything else the type."""
    return repr(value)[:40] if isinstance(value, str | bool | Real) else _name(value)


def _name(value: Any) -> str:
    return "None" if value is None else type(value).__name__

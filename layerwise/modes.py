"""Modes of PyTorch that the program around may have switched on, and work without them.

Under `torch.autocast` products of float32 silently become products of bfloat16 or float16,
and under `torch.inference_mode` nothing can be differentiated.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Compute in the types of the tensors, on every device."""
    accelerator = torch.accelerator.current_accelerator()
    devices = {"cpu", "cuda", "cpu" if accelerator is None else accelerator.type}
    with ExitStack() as stack:
        for device in devices:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def in_ordinary_mode(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Decorate a function so that it works without autocast and inference mode.

    If an argument is a module that was made in inference mode, that mode stays: its
    parameters can be changed in no other.
    """

    @wraps(work)
    def ordinary(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        given = (*args, *kwargs.values())
        made_in_it = any(_is_inference(value) for value in given)
        inference = torch.is_inference_mode_enabled() and made_in_it
        with without_autocast(), torch.inference_mode(inference):
            return work(*args, **kwargs)

    return ordinary


def _is_inference(value: Any) -> bool:
    tensors = value.parameters() if isinstance(value, nn.Module) else ()
    return any(tensor.is_inference() for tensor in tensors)

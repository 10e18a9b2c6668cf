"""Model objects that a run cannot prune as they are, and what to call first.

Wrappers hide the model, offloaded parameters have no values, and the weight of a linear
layer may be computed from other tensors. Writing to such a model would change nothing, or
stop in the middle of a run. So it is refused before a weight is touched.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from layerwise.errors import UnsupportedModelError

WRAPPERS = {  # class -> attribute that holds the model
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "DeepSpeedEngine": "module",
}
# tensors beside a weight that torch.nn.utils computes in a hook -> the call that ends it
COMPUTED = {
    "weight_mask": "torch.nn.utils.prune.remove(module, 'weight')",
    "weight_g": "torch.nn.utils.remove_weight_norm(module)",
    "weight_u": "torch.nn.utils.remove_spectral_norm(module)",
}


def check_object(model: nn.Module) -> None:
    """Refuse a model object whose weights cannot be read and written in place.

    Raises
    ------
    UnsupportedModelError
        With the name of the module or parameter, and what to call or give instead.
    """
    kind = type(model).__name__
    if kind in WRAPPERS:
        message = f"this {kind} wraps the model: give its attribute {WRAPPERS[kind]}"
        raise UnsupportedModelError(message)
    if getattr(model, "is_quantized", False):
        message = f"this {kind} is quantised: prune the original, then quantise the result"
        raise UnsupportedModelError(message)
    for name, module in model.named_modules():
        if (reason := _hidden_weight(name, module)) is not None:
            raise UnsupportedModelError(reason)
    for name, parameter in model.named_parameters():
        if (reason := _no_plain_tensor(parameter)) is not None:
            message = f"parameter {name} {reason}"
            raise UnsupportedModelError(message)


def _hidden_weight(name: str, module: nn.Module) -> str | None:
    """Why writing to the weight of a module inside the blocks would change nothing."""
    if type(module).__module__.startswith("peft."):
        return (
            f"{name or 'the model'} is an adapter of peft ({type(module).__name__}): merge "
            f"it first, model = model.merge_and_unload()"
        )
    if not any(part.isdigit() for part in name.split(".")):
        return None  # outside the blocks nothing is written
    if parametrize.is_parametrized(module, "weight"):
        return (
            f"the weight of {name} is parametrised: call "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first"
        )
    tensors = {*module._parameters, *module._buffers}
    for beside, call in COMPUTED.items():
        if beside in tensors and "weight" not in tensors:
            return f"the weight of {name} is computed from {beside}: call {call} first"
    if ".quantized" in type(module).__module__:
        return f"{name} is quantised: prune the original, then quantise the result"
    return None


def _no_plain_tensor(parameter: nn.Parameter) -> str | None:
    """Why the values of a parameter cannot be read and written."""
    if is_lazy(parameter):
        return "has no shape yet: run the model once"
    if parameter.is_meta:
        return (
            "has no values (meta device: offloaded, or made without weights): give the "
            "folder of the model instead, or load it without device_map"
        )
    kind: Any = type(parameter.detach())
    if kind is not Tensor:
        return f"is a {kind.__name__}: give the model with ordinary tensors, or its folder"
    if not parameter.is_floating_point():
        kind = str(parameter.dtype).removeprefix("torch.")
        return f"has values of type {kind}: prune the model before it is quantised"
    return None

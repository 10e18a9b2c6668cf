"""Linear layers and their weights as matrices (out, in), however they are stored.

``torch.nn.Linear`` stores (out, in). The ``Conv1D`` of transformers, which GPT-2 uses, is a
linear layer whose parameter is the transpose, (in, out). Problems, masks and n:m groups are
always (out, in): groups run along the inputs.
"""

from torch import Tensor, nn


def is_linear(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer that owns its weight parameter.

    A weight that is computed from others (``torch.nn.utils.parametrize``) does not count,
    because writing to it would change nothing.
    """
    kind = isinstance(module, nn.Linear) or is_transposed(module)
    return kind and module is not None and "weight" in module._parameters


def is_transposed(module: nn.Module | None) -> bool:
    """Whether a module is a linear layer that stores its weight as (in, out)."""
    if module is None or isinstance(module, nn.Linear):
        return False
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def matrix(linear: nn.Module) -> Tensor:
    """Weight of a linear layer, shape (out, in); writing to it writes to the layer."""
    weight: Tensor = linear.get_parameter("weight").detach()
    return weight.T if is_transposed(linear) else weight

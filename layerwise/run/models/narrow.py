"""Attention values that are narrower than a head.

The attention of transformers views values by the size of a head. If some channels of the
values are removed, two modules keep that view: the projection of the values writes its
outputs to their former positions, with zeros between them, and the output projection reads
the remaining positions. This is exact with every kernel of attention. Weights keep their
names, but the modules are not instances of ``Linear``: code that would replace the weight
of a linear layer must not treat them as one.
"""

import torch
from torch import Tensor, nn


class _Narrow(nn.Module):
    """A linear layer with a list of positions, at its outputs or at its inputs."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    index: Tensor

    def __init__(self, linear: nn.Module, index: Tensor, width: int) -> None:
        super().__init__()
        self.weight = linear.get_parameter("weight")
        self.register_parameter("bias", linear._parameters.get("bias"))
        self.width = width
        self._positions = index.tolist()
        self.register_buffer("index", None, persistent=False)
        self.restore()
        self.train(linear.training)

    def restore(self) -> None:
        """Create the list of positions on the device of the weight, as after loading."""
        self.index = torch.tensor(self._positions, device=self.weight.device)

    def extra_repr(self) -> str:
        """Shape of the weight and number of positions."""
        return f"weight={tuple(self.weight.shape)}, places={self.width}"


class ScatteredLinear(_Narrow):
    """Linear layer that writes to the positions `index` of `width`, zeros elsewhere."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs of shape (..., width)."""
        narrow = nn.functional.linear(inputs, self.weight, self.bias)
        wide = narrow.new_zeros(*narrow.shape[:-1], self.width)
        return wide.index_copy(-1, self.index, narrow)


class GatheredLinear(_Narrow):
    """Linear layer that reads the positions `index` of `width` inputs."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return outputs of inputs of shape (..., width)."""
        narrow = inputs.index_select(-1, self.index)
        return nn.functional.linear(narrow, self.weight, self.bias)


def spread(module: _Narrow) -> nn.Linear:
    """Return an equivalent ordinary linear layer, with zero rows or columns."""
    axis = 0 if isinstance(module, ScatteredLinear) else 1
    weight = _spread(module.weight, axis, module)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    if module.bias is not None:
        linear.bias = _spread(module.bias, 0, module) if axis == 0 else module.bias
    return linear.train(module.training)


def _spread(narrow: nn.Parameter, axis: int, module: _Narrow) -> nn.Parameter:
    shape = list(narrow.shape)
    shape[axis] = module.width
    wide = torch.zeros(shape, dtype=narrow.dtype, device=narrow.device)
    wide.index_copy_(axis, module.index, narrow.detach())
    return nn.Parameter(wide, requires_grad=narrow.requires_grad)

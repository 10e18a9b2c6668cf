r"""Low-rank changes of a sparse weight, as parametrizations of PyTorch.

With W the pruned weight, M its mask, B (out, r), A (r, in) trained and s a fixed scale:

===========  ==========================  =======================  ===================
kind         weight while training       weight after merging     start
===========  ==========================  =======================  ===================
lora         ``W + s B A``               the same                 B = 0, A random
lora-prune   ``W + s B A``               ``W + s M * (B A)``      B = 0, A random
scale-lora   ``W * (B A)``               the same                 ``B A = 1``
masklora     ``W + s M * (B A)``         the same                 B = 0, A random
===========  ==========================  =======================  ===================

All kinds but `lora` end with the zeros of the mask; `lora` is for dense weights such as the
LM head. A parametrization replaces the weight wherever it is read. This includes models
such as Mamba, which use a weight without calling its layer.

References
----------
.. [1] M. Zimmer, M. Andoni, C. Spiegel, S. Pokutta, "PERP: Rethinking the Prune-Retrain
   Paradigm in the Era of LLMs", arXiv:2312.15230, section 2.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["lora", "lora-prune", "scale-lora", "masklora"]
KINDS: tuple[str, ...] = get_args(Kind)


class LowRank(nn.Module):
    """Parametrization of one weight; its two factors are float32 parameters.

    Parameters
    ----------
    kind
        Row of the table above.
    weight
        The weight, shape (rows, columns), as it is stored.
    mask
        Kept entries in the same shape; None: all.
    rank, scale
        Rank r and scale s.
    generator
        Random generator for A, on the CPU.
    """

    mask: Tensor

    def __init__(
        self,
        kind: Kind,
        weight: Tensor,
        mask: Tensor | None,
        rank: int,
        scale: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.kind, self.scale = kind, scale
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        if kind == "scale-lora":
            left = torch.full((rows, rank), rank**-0.5)
            right = torch.full((rank, columns), rank**-0.5)
        else:  # the uniform distribution of Kaiming with the slope that LoRA uses
            left = torch.zeros(rows, rank)
            bound = 1 / math.sqrt(columns)
            right = torch.rand(rank, columns, generator=generator) * 2 * bound - bound
        self.left = nn.Parameter(left.to(weight.device))
        self.right = nn.Parameter(right.to(weight.device))
        kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
        self.register_buffer("mask", kept.to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Weight while training."""
        product = self.left @ self.right
        if self.kind == "scale-lora":
            return weight * product
        if self.kind == "masklora":
            product = product * self.mask
        return torch.add(weight, product, alpha=self.scale)

    def merged(self, weight: Tensor) -> Tensor:
        """Weight after merging, exactly zero where the mask is False."""
        return torch.where(self.mask, self(weight), 0)


class Masked(nn.Module):
    """Parametrization that trains a weight itself and keeps its zeros.

    Parameters
    ----------
    mask
        Kept entries, in the shape of the weight.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        """Weight while training."""
        return weight * self.mask

    def merged(self, weight: Tensor) -> Tensor:
        """Weight with exact zeros."""
        return torch.where(self.mask, weight, 0)

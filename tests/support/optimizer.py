"""Small parameters for an optimizer, their gradients, and a few of its steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from layerwise.solvers.adapprox import PUBLISHED, Adapprox

SHAPES = ((24, 40), (40, 24), (24, 40), (7,), (2, 9), (8, 4, 8), ())
VARIANTS: Sequence[dict[str, Any]] = (
    {},
    dict(PUBLISHED),
    {"betas": (0.0, 0.99)},
    {"cosine_guidance": True, "weight_decay": 0.1},
)


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    generator = Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(given: Sequence[Tensor], seed: int) -> None:
    """Full spectrum, with scales of rows that differ."""
    generator = Generator().manual_seed(100 + seed)
    for p in given:
        gradient = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            rows = torch.randn(p.shape[0], generator=generator).exp()
            gradient = (gradient.flatten(1) * rows[:, None]).reshape(p.shape)
        p.grad = gradient.to(p.dtype)


def run(optimizer: Adapprox, steps: range) -> None:
    given = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        set_gradients(given, step)
        optimizer.step()

"""Small layers on which rounding matters, one for every seed.

Inputs: plain, of a steep spectrum, with scales from 1e-8 to 1e8, nearly equal channels,
channels that are nearly constant. Weights: plain, in the directions in which the gram is
singular, of sizes from 1e-5 to 1e5. Half of the layers have other inputs in the pruned
model. All precisions, and damping from zero to a tenth.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem

DAMPINGS = (0.0, 0.0, 1e-16, 1e-14, 1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 0.1)
ORDINARY = 1e-4  # damping from which on nearly everything can be proven
DOUBLE = torch.float64


@dataclass(frozen=True)
class HardLayer:
    """Weights and inputs of one layer, a random mask, and the choices of its test."""

    weight: Tensor
    inputs: Tensor
    pruned_inputs: Tensor | None
    damping: float
    kept: Tensor
    choose: random.Random

    @classmethod
    def of(cls, seed: int, rows: int = 4, widest: int = 8) -> "HardLayer":
        """Layer of a seed, the same on every machine up to the rounding of a product."""
        choose = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        width = choose.randint(2, widest)
        inputs = _inputs(choose, generator, width)
        weight = _weight(choose, generator, inputs, rows)
        pruned: Tensor | None = None
        if choose.random() < 0.5:
            noise = torch.randn(inputs.shape, generator=generator, dtype=DOUBLE)
            noise *= inputs.std()
            if choose.random() < 0.3:  # as singular as the inputs, so the shift cancels
                tokens = inputs.shape[1]
                mixture = torch.randn(tokens, tokens, generator=generator, dtype=DOUBLE)
                noise = inputs @ mixture / tokens**0.5
            pruned = inputs + 10 ** choose.uniform(-3, 1.5) * noise
        dtype = choose.choice([DOUBLE, torch.float32, torch.float32, torch.bfloat16])
        seen = DOUBLE if dtype == DOUBLE else torch.float32
        share = choose.choice([0.2, 0.5, 0.5, 0.8, 1.1])
        return cls(
            weight.to(dtype),
            inputs.to(seen),
            None if pruned is None else pruned.to(seen),
            choose.choice(DAMPINGS),
            torch.rand(rows, width, generator=generator) < share,
            choose,
        )

    def problem(self, pattern: Pattern) -> LayerProblem:
        """Problem of these inputs at the damping of the layer."""
        return LayerProblem.from_inputs(
            self.weight,
            self.inputs,
            self.pruned_inputs,
            pattern=pattern,
            damping=self.damping,
        )

    def cut(self, rows: int, width: int) -> "HardLayer":
        """First rows and channels of the layer."""
        pruned = self.pruned_inputs
        return HardLayer(
            self.weight[:rows, :width],
            self.inputs[:width],
            None if pruned is None else pruned[:width],
            self.damping,
            self.kept[:rows, :width],
            self.choose,
        )


def _inputs(choose: random.Random, generator: torch.Generator, width: int) -> Tensor:
    tokens = choose.choice([1, 2, width // 2 + 1, width, 2 * width, 4 * width])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE)

    inputs, kind = normal(width, tokens), choose.randrange(5)
    if kind == 1:  # condition of the gram up to 1e16
        basis = torch.linalg.qr(normal(width, width))[0]
        slope = torch.linspace(0, -choose.uniform(1, 8), width, dtype=DOUBLE)
        inputs = basis * 10**slope @ inputs
    elif kind == 2:
        inputs *= 10 ** (16 * torch.rand(width, 1, generator=generator, dtype=DOUBLE) - 8)
    elif kind == 3:
        copies = choose.randrange(1, width)
        apart = 10 ** choose.uniform(-12, -1)
        inputs[:copies] = inputs[copies] + apart * inputs[:copies]
    elif kind == 4:
        inputs = normal(width, 1) + 10 ** choose.uniform(-8, 0) * inputs
    return inputs


def _weight(
    choose: random.Random, generator: torch.Generator, inputs: Tensor, rows: int
) -> Tensor:
    weight = torch.randn(rows, len(inputs), generator=generator, dtype=DOUBLE)
    kind = choose.randrange(4)
    if kind == 1:  # every direction with the same output, so up to 1e9 where there is none
        values, vectors = torch.linalg.eigh(inputs @ inputs.T)
        weight = weight * values.clamp(min=1e-18).rsqrt() @ vectors.T
    elif kind == 2:
        weight *= 10 ** (10 * torch.rand(weight.shape, generator=generator) - 5)
    return weight

"""One decoder block with the shapes of a known model, on grams like captured ones.

Weights are random. The gram of a group has the width of the model and the spectrum that
the same kind of layer has in a packaged model (:mod:`tests.benchmarks.spectra`). Matrices
that read the same inputs are one group.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.moments import Moments
from layerwise.patterns import Pattern, Unstructured
from layerwise.problem import LayerProblem
from tests.benchmarks.spectra import realistic_gram

SPARSITY = 0.5
LLAMA, OPT = "llama/model.layers.1", "opt/model.decoder.layers.1"


@dataclass(frozen=True)
class Group:
    """Matrices that read the same inputs.

    Parameters
    ----------
    name
        Names of the matrices, joined by a comma.
    width
        Inputs.
    rows
        Outputs of every matrix.
    captured
        Layer of a packaged model whose spectrum the gram has.
    """

    name: str
    width: int
    rows: tuple[int, ...]
    captured: str


@dataclass(frozen=True)
class LayerSet:
    """Groups of one decoder block, and the number of blocks of the model."""

    name: str
    blocks: int
    groups: tuple[Group, ...]


def llama(name: str, hidden: int, kv: int, inner: int, blocks: int) -> LayerSet:
    """Seven matrices in four groups."""
    return LayerSet(
        name,
        blocks,
        (
            Group("q,k,v", hidden, (hidden, kv, kv), f"{LLAMA}.self_attn.q_proj"),
            Group("o", hidden, (hidden,), f"{LLAMA}.self_attn.o_proj"),
            Group("gate,up", hidden, (inner, inner), f"{LLAMA}.mlp.up_proj"),
            Group("down", inner, (hidden,), f"{LLAMA}.mlp.down_proj"),
        ),
    )


def opt(name: str, hidden: int, blocks: int) -> LayerSet:
    """Six matrices in four groups."""
    return LayerSet(
        name,
        blocks,
        (
            Group("q,k,v", hidden, (hidden,) * 3, f"{OPT}.self_attn.q_proj"),
            Group("out", hidden, (hidden,), f"{OPT}.self_attn.out_proj"),
            Group("fc1", hidden, (4 * hidden,), f"{OPT}.fc1"),
            Group("fc2", 4 * hidden, (hidden,), f"{OPT}.fc2"),
        ),
    )


def restored(name: str, hidden: int, inner: int, blocks: int) -> LayerSet:
    """Return the two matrices that FASP restores: those whose columns leave."""
    return LayerSet(
        name,
        blocks,
        (
            Group("o", hidden, (hidden,), f"{LLAMA}.self_attn.o_proj"),
            Group("down", inner, (hidden,), f"{LLAMA}.mlp.down_proj"),
        ),
    )


def warm_up(layers: LayerSet) -> LayerSet:
    """Return the first group alone."""
    return LayerSet(f"{layers.name}, warm-up", 1, layers.groups[:1])


@dataclass(eq=False)
class Block:
    """Weights and grams of one decoder block on a device.

    Parameters
    ----------
    layers
        Shapes.
    device
        Where everything is.
    answers
        Refitted weights by group, for the stage that proves bounds.
    """

    layers: LayerSet
    device: torch.device
    answers: dict[str, Tensor] = field(default_factory=dict)
    _weights: dict[str, Tensor] = field(default_factory=dict)
    _grams: dict[str, Tensor] = field(default_factory=dict)

    def prepare(self, group: Group) -> None:
        """Make the weight of a group, rows stacked, and its gram."""
        seed = len(self._weights)
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = (sum(group.rows), group.width)
        weight = torch.randn(shape, generator=generator, device=self.device)
        self._weights[group.name] = weight / group.width**0.5
        self._grams[group.name] = realistic_gram(
            group.width, group.captured, seed, self.device
        )

    def check_prepared(self) -> None:
        """Raise unless every group is there."""
        if missing := [g.name for g in self.layers.groups if g.name not in self._grams]:
            message = f"no weights and grams of {', '.join(missing)}: see preparation"
            raise RuntimeError(message)

    def moments(self, group: Group) -> Moments:
        """Fresh moments: what a stage shares and factors is freed with the stage."""
        return Moments(self._grams[group.name], n_tokens=16 * group.width)

    def problem(self, group: Group, pattern: Pattern | None = None) -> LayerProblem:
        """All matrices of a group as one problem, half of every row removed."""
        weight = self._weights[group.name]
        moments = self.moments(group)
        return LayerProblem.from_moments(
            weight, moments, pattern=pattern or Unstructured(SPARSITY)
        )

    def matrices(self, group: Group) -> Iterator[LayerProblem]:
        """Every matrix of a group as a problem; they share their moments."""
        moments = self.moments(group)
        for weight in torch.split(self._weights[group.name], list(group.rows)):
            yield LayerProblem.from_moments(weight, moments, pattern=Unstructured(SPARSITY))

    def wanda_mask(self, group: Group) -> Tensor:
        """Half of every row by weight times size of the input, shape (rows, in)."""
        sizes = self._grams[group.name].diagonal().sqrt().float()
        return Unstructured(SPARSITY).mask(self._weights[group.name].abs() * sizes)


FULL = (
    opt("opt-125m", 768, 12),
    llama("llama-3-8b", 4096, 1024, 14336, 32),
)
SMALL = (
    opt("opt-125m / 6", 128, 12),
    llama("llama-3-8b / 32", 128, 32, 448, 32),
)
FULL_RESTORED = restored("llama-30b", 6656, 17920, 60)
SMALL_RESTORED = restored("llama-30b / 16", 416, 1120, 60)

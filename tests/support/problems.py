"""Layers of known difficulty, patterns, and strategies that draw both.

A layer keeps its inputs, so that every claim about moments can be checked against the
formula ``||W X - What Xhat||_F^2 / tokens`` itself.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import InvalidProblemError
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem


@dataclass(frozen=True, eq=False)
class Layer:
    """Weight (out, in) and inputs (in, tokens) of a dense and of a pruned model."""

    weight: Tensor
    inputs: Tensor
    pruned_inputs: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def seen(self) -> Tensor:
        """Xhat: the inputs of the pruned model."""
        return self.inputs if self.pruned_inputs is None else self.pruned_inputs

    @property
    def energy(self) -> float:
        """``||W X||_F^2 / tokens`` in float64."""
        outputs = self.weight.double() @ self.inputs.double()
        return float(outputs.square().sum() / self.inputs.shape[1])

    def magnitude(self, weight: Tensor) -> float:
        """Bound on every term of the objective, without signs that cancel."""
        size = self.inputs.double().square().mean(dim=1).sqrt()
        size = size + self.seen.double().square().mean(dim=1).sqrt()
        terms = (self.weight.double().abs() + weight.double().abs()) @ size
        return float(terms.square().sum())

    @property
    def gradient_norm(self) -> Tensor:
        """Gradient of ``sum |W X| / tokens``: like that of any loss linear in X."""
        inputs = self.inputs.double()
        signs = torch.sign(self.weight.double() @ inputs)
        return (signs @ inputs.T / inputs.shape[1]).abs()

    def problem(self, pattern: Pattern, damping: float = 0.01) -> LayerProblem:
        return LayerProblem.from_inputs(
            self.weight,
            self.inputs,
            self.pruned_inputs,
            pattern=pattern,
            damping=damping,
            gradient_norm=self.gradient_norm,
        )

    def explicit_rows(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """``||W X - What Xhat - b||^2 / tokens`` of every row, by its definition."""
        outputs = self.weight.double() @ self.inputs.double()
        error = outputs - weight.double() @ self.seen.double()
        if bias is not None:
            error = error - bias[:, None]
        return error.square().sum(dim=1) / self.inputs.shape[1]

    def explicit(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """``||W X - What Xhat - b||_F^2 / tokens``, by its definition."""
        return float(self.explicit_rows(weight, bias).sum())

    def centered(self) -> "Layer":
        """Return the layer about its means, in float64, as the best bias makes it."""
        inputs, seen = self.inputs.double(), self.seen.double()
        return Layer(
            self.weight,
            inputs - inputs.mean(dim=1, keepdim=True),
            None if self.pruned_inputs is None else seen - seen.mean(dim=1, keepdim=True),
        )

    def to(self, where: torch.dtype | str) -> "Layer":
        """Return the layer in another precision, or on another device."""
        other = None if self.pruned_inputs is None else self.pruned_inputs.to(where)
        return Layer(self.weight.to(where), self.inputs.to(where), other)

    def scaled(self, factor: float) -> "Layer":
        """Return the layer with all inputs multiplied by a factor."""
        other = None if self.pruned_inputs is None else self.pruned_inputs * factor
        return replace(self, inputs=self.inputs * factor, pruned_inputs=other)

    def rows(self, order: Tensor) -> "Layer":
        """Return the layer with its outputs selected or permuted."""
        return replace(self, weight=self.weight[order])

    def columns(self, order: Tensor) -> "Layer":
        """Return the layer with its inputs permuted."""
        other = None if self.pruned_inputs is None else self.pruned_inputs[order]
        return Layer(self.weight[:, order], self.inputs[order], other)


def make_layer(
    seed: int,
    rows: int = 6,
    width: int = 16,
    tokens: int = 48,
    *,
    drift: float = 0.0,
    condition: float = 1.0,
    correlation: float = 0.0,
) -> Layer:
    """Random float64 layer, everything drawn from the seed.

    `drift` is the relative size of ``Xhat - X``, `condition` the condition number of the
    population gram, `correlation` the correlation of neighbouring channels.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight, inputs = normal(rows, width), normal(width, tokens)
    if correlation:
        lag = torch.arange(width, dtype=torch.float64)
        population = correlation ** (lag[:, None] - lag).abs()
        inputs = torch.linalg.cholesky(population) @ inputs
    if condition > 1:
        basis = torch.linalg.qr(normal(width, width))[0]
        exponents = torch.linspace(0, 1, width, dtype=torch.float64)
        inputs = (basis * condition ** (-exponents / 2)) @ inputs
    if not drift:
        return Layer(weight, inputs)
    # the pruned model sees a mixture of the channels, so that C is far from symmetric
    mixing = torch.triu(normal(width, width), 1) / width**0.5
    return Layer(weight, inputs, inputs + drift * (mixing @ inputs + normal(width, tokens)))


def _with_dead_channel(layer: Layer, channel: int) -> Layer:
    inputs = layer.inputs.clone()
    inputs[channel] = 0
    return replace(layer, inputs=inputs)


def _with_outlier(layer: Layer, channel: int, factor: float) -> Layer:
    scale = torch.ones(layer.shape[1], dtype=layer.inputs.dtype)
    scale[channel] = factor
    other = layer.pruned_inputs
    return replace(
        layer,
        inputs=layer.inputs * scale[:, None],
        pruned_inputs=None if other is None else other * scale[:, None],
    )


def _with_duplicate(layer: Layer, channel: int, copy: int) -> Layer:
    inputs = layer.inputs.clone()
    inputs[copy] = inputs[channel]
    return replace(layer, inputs=inputs)


DEAD_CHANNEL = 5

PROBLEMS: Mapping[str, Layer] = MappingProxyType(
    {
        "plain": make_layer(1),
        "drifted": make_layer(2, drift=0.3),
        "plain-float32": make_layer(3).to(torch.float32),
        "drifted-float32": make_layer(4, drift=0.3).to(torch.float32),
        "dead-channel": _with_dead_channel(make_layer(5), DEAD_CHANNEL),
        "duplicate-channel": _with_duplicate(make_layer(6), 2, 9),
        "few-tokens": make_layer(7, tokens=10, drift=0.2),
        "one-row": make_layer(8, rows=1, drift=0.2),
        "one-column": make_layer(9, width=1, drift=0.2),
        "odd-width": make_layer(10, rows=5, width=13, drift=0.2),
        "correlated": make_layer(11, correlation=0.9, drift=0.1),
        "condition-1e8": make_layer(12, condition=1e8, drift=0.05),
        "outlier-float32": _with_outlier(make_layer(13, drift=0.1), 3, 1e3).to(
            torch.float32
        ),
        "half-precision": make_layer(14, drift=0.2).to(torch.float16),
    }
)
DOUBLE = [name for name, layer in PROBLEMS.items() if layer.weight.dtype == torch.float64]


def uneven_mask(layer: Layer, seed: int = 0) -> Tensor:
    """Mask whose rows remove different numbers of weights: the first none, the last all."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(0.9, 0.1, len(layer.weight))[:, None]
    mask = torch.rand(layer.shape, generator=generator) < share
    if len(mask) > 1:
        mask[0], mask[-1] = True, False
    return mask


def _random_mask(layer: Layer) -> Pattern:
    """Fixed mask with one full and one empty row if the layer has three or more."""
    generator = torch.Generator().manual_seed(layer.weight.numel())
    kept = torch.rand(layer.shape, generator=generator) < 0.5
    if len(kept) > 2:
        kept[1], kept[2] = True, False
    return FixedMask(kept)


def _balanced_columns(layer: Layer) -> Pattern:
    """Units of two columns that are not neighbours, in two heads; an odd one is alone."""
    width = layer.shape[1]
    units, half = (width + 1) // 2, (width + 3) // 4
    heads = torch.arange(units) // half
    smallest = int(torch.bincount(heads).min())
    return Columns(max(1, smallest // 2), torch.arange(width) % units, heads)


PATTERNS: Mapping[str, Callable[[Layer], Pattern]] = MappingProxyType(
    {
        "row-0.5": lambda _: Unstructured(0.5),
        "row-0.7": lambda _: Unstructured(0.7),
        "layer-0.5": lambda _: Unstructured(0.5, "layer"),
        "layer-0.7": lambda _: Unstructured(0.7, "layer"),
        "2:4": lambda _: NM(2, 4),
        "1:4": lambda _: NM(1, 4),
        "4:8": lambda _: NM(4, 8),
        "columns": lambda layer: Columns((layer.shape[1] + 1) // 2),
        "column-heads": _balanced_columns,
        "fixed": _random_mask,
        "fixed-columns": lambda layer: FixedMask(
            Columns((layer.shape[1] + 1) // 2).mask(layer.weight.double().abs())
        ),
    }
)


def fits(pattern: Pattern, layer: Layer) -> bool:
    """Whether some mask of the layer's shape satisfies the pattern."""
    try:
        pattern.check(layer.shape)
    except InvalidProblemError:
        return False
    return True


@st.composite
def layers(
    draw: st.DrawFn, *, max_rows: int = 4, max_width: int = 12, drift: bool = True
) -> Layer:
    """Draw a seed and the difficulty of a layer; tensors follow from the seed."""
    width = draw(st.integers(1, max_width), label="width")
    return make_layer(
        draw(st.integers(0, 2**32 - 1), label="seed"),
        draw(st.integers(1, max_rows), label="rows"),
        width,
        draw(st.integers(1, 3 * width + 2), label="tokens"),
        drift=draw(st.sampled_from([0.0, 0.1, 1.0]), label="drift") if drift else 0.0,
        condition=draw(st.sampled_from([1.0, 1e2, 1e4, 1e8]), label="condition"),
        correlation=draw(st.sampled_from([0.0, 0.9]), label="correlation"),
    )


@st.composite
def patterns(draw: st.DrawFn, layer: Layer) -> Pattern:
    """Draw a pattern that a layer can have."""
    width = layer.shape[1]
    sparsity = draw(st.integers(0, 99), label="percent") / 100
    choices: list[Pattern] = [Unstructured(sparsity), Unstructured(sparsity, "layer")]
    sizes = [m for m in range(1, 9) if width % m == 0]
    m = draw(st.sampled_from(sizes), label="m")
    choices.append(NM(draw(st.integers(1, m), label="n"), m))
    return draw(st.sampled_from(choices), label="pattern")

"""Rows of the matrix that are problems: every one of them is solved, unless it says so."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.patterns import NM, Columns, FixedMask, Unstructured
from tests.support.matrix import Row, Sample, layer_of, of
from tests.support.problems import Layer, make_layer

Change = Callable[[Layer], Layer]
DIVISIBLE = {"2:4": "InvalidProblemError: needs a width divisible by 4"}


def changed(change: Change, *args: Any, **kwargs: Any) -> Callable[[torch.dtype], Sample]:
    """Sample of a float64 layer that is changed and then rounded."""
    return lambda dtype: of(change(make_layer(*(args or (1,)), **kwargs)).to(dtype))


def inputs(change: Any, **kwargs: Any) -> Any:
    return changed(lambda layer: replace(layer, inputs=change(layer.inputs)), **kwargs)


def weight(change: Any, **kwargs: Any) -> Any:
    return changed(lambda layer: replace(layer, weight=change(layer.weight)), **kwargs)


def seen(change: Any, **kwargs: Any) -> Any:
    return changed(
        lambda layer: replace(layer, pruned_inputs=change(layer.inputs)), **kwargs
    )


def put(tensor: Tensor, index: Any, value: Any) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


def times(tensor: Tensor, index: Any, factor: float) -> Tensor:
    return put(tensor, index, tensor[index] * factor)


def posed(**settings: Any) -> Callable[[torch.dtype], Sample]:
    return lambda dtype: of(layer_of(dtype), **settings)


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


ROWS: list[Row] = []
# they compare all sets of removed entries of a group: 8 of 16 are too many
JOINT = ("multi-weight", "multi-weight-ms", "multi-weight-mm")


def add(name: str, make: Any, **declared: Any) -> None:
    ROWS.append(Row(name, make, **declared))


SHAPES = [(1, 4), (1, 16), (6, 4), (16, 4), (2, 8), (1, 1), (6, 1), (3, 5), (5, 13)]
for rows, width in [*SHAPES, (6, 3), (48, 16), (12, 48), (2, 64), (8, 32), (6, 17)]:
    add(
        f"weight {rows}x{width}",
        changed(lambda layer: layer, 2, rows, width),
        but=DIVISIBLE if width % 4 else {},
    )
for tokens in (1, 2, 4, 8, 15, 16, 17, 200):
    add(f"{tokens} tokens", changed(lambda layer: layer, 3, tokens=tokens))
for power in (2, 4, 6, 8, 10, 12, 14, 16):
    add(f"condition 1e{power}", changed(lambda layer: layer, 4, condition=10.0**power))
for correlation in (0.5, 0.9, 0.99, 0.999):
    add(f"correlation {correlation}", changed(lambda x: x, 5, correlation=correlation))
for power in (-30, -24, -20, -15, -10, -5, 5, 10, 15, 20, 30):
    factor = 10.0**power
    add(f"inputs times 1e{power}", inputs(lambda x, f=factor: x * f))
    add(f"weight times 1e{power}", weight(lambda w, f=factor: w * f))
for power in (-30, -24, -12, -6, 3, 5, 8, 12):
    factor = 10.0**power
    add(f"a channel times 1e{power}", inputs(lambda x, f=factor: times(x, 3, f)))
for power in (-20, -6, 6, 12):
    factor = 10.0**power
    add(f"a row of the weight times 1e{power}", weight(lambda w, f=factor: times(w, 2, f)))
for power in (3, 6, 12):
    factor = 10.0**power
    add(f"a weight times 1e{power}", weight(lambda w, f=factor: times(w, (1, 5), f)))
add("weights of 3e38", weight(lambda w: w / w.abs().max() * 1e38))
add(
    "a tiny channel with huge weights",
    changed(
        lambda x: Layer(times(x.weight, (slice(None), 3), 1e24), times(x.inputs, 3, 1e-24))
    ),
)

# -- structure of the inputs -----------------------------------------------------------

for dead in (1, 4, 15):
    add(f"{dead} dead channels", inputs(lambda x, n=dead: put(x, slice(0, n), 0.0)))
for copies in (2, 4, 8, 16):
    add(f"{copies} equal channels", inputs(lambda x, n=copies: put(x, slice(0, n), x[0])))
add("opposite channels", inputs(lambda x: put(x, 3, -x[2])))
add("a channel is a sum of others", inputs(lambda x: put(x, 3, x[1] + x[2])))
for count in (1, 4, 16):
    add(f"{count} constant channels", inputs(lambda x, n=count: put(x, slice(0, n), 3.7)))
add("inputs of one", inputs(torch.ones_like))
for mean in (1, 10, 100, 1000, 3000, 1e4, 1e5, 1e6):
    add(f"means of {mean:g}", inputs(lambda x, m=mean: x + m))
    add(f"a mean of {mean:g}", inputs(lambda x, m=mean: put(x, 4, x[4] + m)))
add("a mean of -3000", inputs(lambda x: put(x, 4, x[4] - 3000)))
add("means of both signs", inputs(lambda x: x + 3000 * torch.linspace(-1, 1, 16)[:, None]))
add(
    "means move",
    changed(lambda x: Layer(x.weight, x.inputs + 3000, x.inputs * 1.01 + 2990)),
)
add("one token 1e3 as large", inputs(lambda x: times(x, (slice(None), 7), 1e3)))
add("one token 1e6 as large", inputs(lambda x: times(x, (slice(None), 7), 1e6)))
add("one entry 1e6 as large", inputs(lambda x: times(x, (3, 7), 1e6)))
add("sparse inputs", inputs(lambda x: x * (random(9, *x.shape) > 1.3)))
add("positive inputs", inputs(torch.relu))
add("inputs of zeros and ones", inputs(lambda x: (x > 0).double()))
add("equal tokens", inputs(lambda x: x[:, :1].repeat(1, 48)))
add("inputs of heavy tails", inputs(lambda x: x**5))
add("one-hot tokens", inputs(lambda x: 4 * torch.eye(16, dtype=x.dtype)))
add("small integers as inputs", inputs(lambda x: (2 * x).round()))

# -- structure of the weight -----------------------------------------------------------

add("a zero row", weight(lambda w: put(w, 2, 0.0)))
add("a zero weight", weight(torch.zeros_like))
add("a zero column", weight(lambda w: put(w, (slice(None), 3), 0.0)))
add("equal weights", weight(torch.ones_like))
add("equal negative weights", weight(lambda w: -torch.ones_like(w)))
add("equal rows", weight(lambda w: w[:1].repeat(6, 1)))
add("equal columns", weight(lambda w: w[:, :1].repeat(1, 16)))
add("weights of three sizes", weight(lambda w: (2 * w).round()))
add("half of the weights are zero", weight(lambda w: w * (w.abs() > 0.7)))
add("negative zeros", weight(lambda w: torch.where(w.abs() > 0.7, w, -0.0)))
add("2:4 already", weight(lambda w: w * NM(2, 4).mask(w.abs())))
add("one row holds all", weight(lambda w: put(torch.zeros_like(w), 3, w[3])))

# -- two streams of inputs -------------------------------------------------------------

for drift in (1e-6, 1e-3, 0.1, 1.0, 10.0):
    add(f"drift {drift:g}", changed(lambda layer: layer, 6, drift=drift))
add("the same inputs twice", seen(lambda x: x.clone()))
add("negative pruned inputs", seen(lambda x: -x))
add("pruned inputs twice as large", seen(lambda x: 2 * x))
add("pruned inputs 1e-6 as large", seen(lambda x: 1e-6 * x))
add("unrelated pruned inputs", seen(lambda x: random(11, *x.shape)))
add("pruned inputs in another order", seen(lambda x: x.flip(0)))
add("a channel died", seen(lambda x: put(x, 3, 0.0)))
add(
    "a channel came to life",
    changed(lambda x: Layer(x.weight, put(x.inputs, 3, 0.0), x.inputs)),
)
add("one token of two streams", changed(lambda layer: layer, 7, tokens=1, drift=0.1))

# -- damping ---------------------------------------------------------------------------

for damping in (0, 1e-12, 1e-8, 1e-6, 1e-4, 0.1, 1, 10, 1e6, 1e20):
    add(f"damping {damping:g}", posed(damping=damping))
for damping in (0.0, 1e-8):
    add(
        f"damping {damping:g}, four tokens",
        lambda dtype, d=damping: of(layer_of(dtype, 3, tokens=4), damping=d),
    )

# -- layouts and types -----------------------------------------------------------------


def with_types(name: str, change: Any) -> None:
    add(name, lambda dtype: change(of(layer_of(dtype))))


with_types("transposed weight", lambda s: replace(s, weight=s.weight.T.contiguous().T))
with_types("transposed inputs", lambda s: replace(s, inputs=s.inputs.T.contiguous().T))
with_types("strided weight", lambda s: replace(s, weight=torch.cat(2 * [s.weight])[::2]))
with_types("strided inputs", lambda s: replace(s, inputs=s.inputs.repeat(1, 2)[:, ::2]))
with_types("weight of stride 0", lambda s: replace(s, weight=s.weight[:1].expand(6, 16)))
with_types("inputs of stride 0", lambda s: replace(s, inputs=s.inputs[:, :1].expand(16, 9)))
with_types("weight with gradient", lambda s: replace(s, weight=s.weight.requires_grad_()))
with_types("inputs with gradient", lambda s: replace(s, inputs=s.inputs.requires_grad_()))
with_types("parameter", lambda s: replace(s, weight=torch.nn.Parameter(s.weight)))
for kind in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    name = str(kind).removeprefix("torch.")
    with_types(f"inputs in {name}", lambda s, k=kind: replace(s, inputs=s.inputs.to(k)))
    with_types(f"weight in {name}", lambda s, k=kind: replace(s, weight=s.weight.to(k)))


def numpy_of(tensor: Tensor, kind: str = "") -> Any:
    array = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
    return array.astype(kind) if kind else array


def read_only(array: Any) -> Any:
    array = array.copy()
    array.flags.writeable = False
    return array


with_types("numpy weight", lambda s: replace(s, weight=numpy_of(s.weight)))
with_types("numpy inputs", lambda s: replace(s, inputs=numpy_of(s.inputs)))
with_types("numpy float16 weight", lambda s: replace(s, weight=numpy_of(s.weight, "f2")))
with_types("numpy of other bytes", lambda s: replace(s, weight=numpy_of(s.weight, ">f4")))
with_types("numpy backwards", lambda s: replace(s, inputs=numpy_of(s.inputs)[:, ::-1]))
with_types("numpy read only", lambda s: replace(s, weight=read_only(numpy_of(s.weight))))
with_types(
    "numpy Fortran", lambda s: replace(s, weight=np.asfortranarray(numpy_of(s.weight)))
)

# -- patterns --------------------------------------------------------------------------

for sparsity in (0, 1 / 96, 0.1, 0.25, 0.29, 0.75, 0.9, 0.99, 0.999999):
    add(f"sparsity {sparsity:.3g}", posed(pattern=Unstructured(sparsity)))
    add(
        f"sparsity {sparsity:.3g} of the layer",
        posed(pattern=Unstructured(sparsity, "layer")),
    )
for n, m in ((1, 4), (3, 4), (4, 4), (4, 8), (1, 2), (1, 16), (1, 1)):
    add(f"pattern {n}:{m}", posed(pattern=NM(n, m)))
MANY = "InvalidProblemError: does not handle the pattern 8:16"
add("pattern 8:16", posed(pattern=NM(8, 16)), but=dict.fromkeys(JOINT, MANY))
for form in (0.5, "0.5", "2:4", np.float32(0.25)):
    add(f"pattern {form!r}", posed(pattern=form))
for keep in (1, 8, 15, 16):
    add(f"{keep} columns", posed(pattern=Columns(keep)))
add("columns in units", posed(pattern=Columns(3, torch.arange(16) // 2)))
UNITS: Any = np.arange(16) // 2
add("units of numpy", posed(pattern=Columns(3, UNITS)))
add(
    "units of two heads",
    posed(pattern=Columns(2, torch.arange(16) // 2, torch.arange(8) % 2)),
)
for name, kept in {
    "everything": torch.ones(6, 16) > 0,
    "nothing": torch.zeros(6, 16) > 0,
    "random entries": random(12, 6, 16) > 0,
    "one entry": put(torch.zeros(6, 16) > 0, (2, 3), True),
    "two rows": put(torch.zeros(6, 16) > 0, slice(0, 2), True),
    "four columns": (torch.arange(16) < 4).repeat(6, 1),
}.items():
    add(f"mask of {name}", posed(pattern=FixedMask(kept)))
KEPT: Any = np.arange(96).reshape(6, 16) % 3 > 0
add("mask of numpy", posed(pattern=FixedMask(KEPT)))

# -- gradients -------------------------------------------------------------------------

for size in (0.0, 1e-30, 1e30, 1e38, 1e45, 1e200):
    norms = torch.full((6, 16), size, dtype=torch.float64)
    add(f"gradients of {size:g}", posed(gradient_norm=norms))
add(
    "no gradients",
    posed(gradient_norm=None),
    but={"gblm": "InvalidProblemError: gblm needs the gradients"},
)

# -- moments in place of inputs --------------------------------------------------------

NO_MEANS = {
    "columns": "InvalidProblemError: centering needs the means",
    "flap": "InvalidProblemError: centering needs the means",
    "dsnot": "InvalidProblemError: dsnot needs the means",
}


def gram_of(layer: Layer) -> Tensor:
    return layer.seen @ layer.seen.T / layer.seen.shape[1]


def moments(gram: Any, **others: Any) -> Callable[[torch.dtype], Sample]:
    weight = make_layer(1).weight
    return lambda dtype: Sample(weight.to(dtype), moments={"gram": gram, **others})


GRAM, MEAN = gram_of(make_layer(1)), make_layer(1).inputs.mean(dim=1)
DEFICIENT = gram_of(make_layer(3, tokens=5, condition=1e4))
for name, gram in {
    "gram": GRAM,
    "identity": torch.eye(16, dtype=torch.float64),
    "diagonal gram": torch.logspace(0, 6, 16, dtype=torch.float64).diag(),
    "gram of rank one": torch.outer(MEAN, MEAN),
    "gram in float32": GRAM.float(),
    "gram in bfloat16": GRAM.bfloat16(),
    "gram in float16": GRAM.half(),
    "gram of rank five in float32": DEFICIENT.float(),
    "gram of rank five in bfloat16": DEFICIENT.bfloat16(),
    "gram not quite symmetric": GRAM + 1e-7 * random(13, 16, 16).triu(1),
    "gram with a square that underflowed": put(put(GRAM, 3, 1e-25), (slice(None), 3), 1e-25)
    * (1 - torch.eye(16)[3].diag()),
}.items():
    add(name, moments(gram), but=NO_MEANS)
add("gram and means", moments(GRAM, input_mean=MEAN))
add("gram and means in float32", moments(GRAM.float(), input_mean=MEAN.float()))
add("gram and mean of numpy", moments(GRAM.numpy(), input_mean=MEAN.numpy()))

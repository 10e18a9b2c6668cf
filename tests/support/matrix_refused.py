"""Rows of the matrix that are not problems: refused in one line before any work."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.patterns import NM, Columns, FixedMask, Unstructured
from tests.support.matrix import Row, Sample, layer_of, of
from tests.support.matrix_solved import GRAM, MEAN, put, random
from tests.support.problems import make_layer

ROWS: list[Row] = []
INVALID = "InvalidProblemError: "


def add(name: str, make: Any, message: str) -> None:
    ROWS.append(Row(name, make, INVALID + message))


def given(dtype: torch.dtype, part: str, change: Callable[[Any], Any]) -> Sample:
    """Sample with one part changed, whatever it is a part of."""
    layer = layer_of(dtype, 1, drift=0.1)
    sample = of(layer)
    if part in ("weight", "inputs", "pruned"):
        return replace(sample, **{part: change(getattr(sample, part))})
    if part in ("energy", "drift", "gradient_norm"):
        like = torch.ones(6, 16) if part == "gradient_norm" else torch.ones(6)
        moments = {"gram": GRAM, "cross_gram": GRAM}
        known = {"drift": torch.ones(6)} if part == "gradient_norm" else {}
        return Sample(layer.weight, moments=moments, posed={**known, part: change(like)})
    statistics = {"gram": GRAM, "input_mean": MEAN}
    like = GRAM if part == "cross_gram" else MEAN
    like = MEAN.square() if part == "fluctuation" else like
    moments = {**statistics, part: change(statistics.get(part, like))}
    posed = {"drift": torch.ones(6)} if part == "cross_gram" else {}
    return Sample(layer.weight, moments=moments, posed=posed)


def with_part(part: str, change: Any) -> Callable[[torch.dtype], Sample]:
    return lambda dtype: given(dtype, part, change)


STATISTICS = ("gram", "cross_gram", "input_mean", "pruned_input_mean", "fluctuation")
MATRICES = ("weight", "inputs", "pruned", "gram", "cross_gram", "gradient_norm")
VECTORS = ("energy", "drift", "input_mean", "pruned_input_mean", "fluctuation")

# -- numbers ---------------------------------------------------------------------------

for value in (math.nan, math.inf, -math.inf):
    for part in (*MATRICES, *VECTORS):
        index: Any = (2, 5) if part in MATRICES else 3
        message = "non-finite" if part in ("energy", "drift") else f"contains {value}"
        message = f"contain {value}" if part in ("inputs", "pruned") else message
        add(
            f"{value} in {part}",
            with_part(part, lambda x, i=index, v=value: put(x.clone(), i, v)),
            message,
        )
for part in ("energy", "drift", "fluctuation", "gradient_norm"):
    message = "not be negative" if part == "gradient_norm" else "contains"
    message = "must be finite and not negative" if part == "gradient_norm" else message
    add(f"negative {part}", with_part(part, lambda x: -x - 1), message)

# -- types -----------------------------------------------------------------------------

TYPES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a list": (lambda x: x.tolist(), "got list"),
    "a number": (lambda x: 1.0, "got float"),
    "text": (lambda x: "weights", "got str"),
    "bool": (lambda x: x > 0, "got bool: convert it"),
    "int64": (lambda x: x.long(), "got int64: convert it"),
    "complex": (lambda x: x.double() + 0j, "got complex128: convert it"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "got float8_e4m3fn: convert it"),
    "sparse": (lambda x: x.to_sparse(), "sparse: convert it"),
    "meta": (lambda x: x.to("meta"), "on the meta device"),
    "integers of numpy": (lambda x: x.long().numpy(), "got int64: convert it"),
    "objects of numpy": (lambda x: np.array([[None]]), "got object array"),
}
for name, (change, message) in TYPES.items():
    for part in ("weight", "inputs", "pruned", "gram", "input_mean", "gradient_norm"):
        add(f"{part} is {name}", with_part(part, change), message)
for part in ("cross_gram", "fluctuation", "energy", "drift"):
    add(f"{part} is a list", with_part(part, lambda x: x.tolist()), "got list")
    add(f"{part} is bool", with_part(part, lambda x: x > 0), "got bool")
for part in ("weight", "inputs", "gram"):
    add(f"{part} is None", with_part(part, lambda x: None), "got None")

# -- shapes ----------------------------------------------------------------------------

for name, part, change, message in (
    ("weight is a vector", "weight", lambda x: x[0], "inputs must be (in, tokens)"),
    (
        "weight of three dimensions",
        "weight",
        lambda x: x[None],
        "inputs must be (in, tokens)",
    ),
    ("weight without rows", "weight", lambda x: x[:0], "weight has shape (0, 16)"),
    ("weight without columns", "weight", lambda x: x[:, :0], "inputs must be (in, tokens)"),
    ("inputs are transposed", "inputs", lambda x: x.T, "inputs must be (in, tokens)"),
    ("inputs are a vector", "inputs", lambda x: x[0], "inputs must be (in, tokens)"),
    ("more pruned inputs", "pruned", lambda x: x.repeat(1, 2), "pruned inputs have shape"),
    ("gram is a vector", "gram", lambda x: x[0], "gram must be a square matrix"),
    ("gram is rectangular", "gram", lambda x: x[:9], "gram has shape (9, 16)"),
    ("gram of another width", "gram", lambda x: x[:9, :9], "(9,)"),
    ("cross_gram of another width", "cross_gram", lambda x: x[:9], "cross_gram has shape"),
    ("input_mean is short", "input_mean", lambda x: x[:9], "input_mean has shape (9,)"),
    ("input_mean is a matrix", "input_mean", lambda x: x[None], "has shape (1, 16)"),
    ("fluctuation is short", "fluctuation", lambda x: x[:9], "fluctuation has shape (9,)"),
    ("energy is short", "energy", lambda x: x[:2], "energy has shape (2,)"),
    ("drift is short", "drift", lambda x: x[:2], "drift has shape (2,)"),
    ("drift is a number", "drift", lambda x: x[0], "drift has shape ()"),
    ("drift is a matrix", "drift", lambda x: x[:, None], "drift has shape (6, 1)"),
    (
        "gradients are transposed",
        "gradient_norm",
        lambda x: x.T,
        "gradient_norm is (16, 6)",
    ),
):
    add(name, with_part(part, change), message)
add("no tokens", lambda dtype: of(layer_of(dtype, 1, tokens=0)), "no tokens were added")
add(
    "width 0",
    lambda dtype: Sample(torch.zeros(4, 0, dtype=dtype), torch.zeros(0, 8, dtype=dtype)),
    "at least one output and one input",
)

# -- grams that no inputs have ---------------------------------------------------------


def gram(value: Any, **others: Any) -> Callable[[torch.dtype], Sample]:
    weight = make_layer(1).weight
    return lambda dtype: Sample(weight.to(dtype), moments={"gram": value, **others})


def spectrum(smallest: float) -> Tensor:
    basis = torch.linalg.qr(random(14, 16, 16))[0]
    values = torch.linspace(1, 2, 16, dtype=torch.float64)
    found: Tensor = (basis * put(values, 0, smallest)) @ basis.T
    return 0.5 * (found + found.T)


ONES = torch.ones(16, 16, dtype=torch.float64)
GRAMS: tuple[tuple[str, Tensor, str], ...] = (
    ("gram is zero", 0 * ONES, "gram is zero"),
    ("gram is not symmetric", GRAM + ONES.triu(1), "gram is not symmetric"),
    ("gram with a negative diagonal", put(GRAM, (3, 3), -1.0), "negative diagonal"),
    ("gram off the diagonal is large", GRAM + 9 * (ONES - ONES.diag().diag()), "exceeds"),
    ("gram is indefinite", 1.9 * ONES.diag().diag() - 0.9 * ONES, "gram is indefinite"),
    ("an eigenvalue of -1e-1", spectrum(-0.1), "gram is indefinite"),
    ("an eigenvalue of -1e-3", spectrum(-1e-3), "gram is indefinite"),
    ("indefinite in float32", spectrum(-1e-2).float(), "gram is indefinite"),
)
for name, entries, message in GRAMS:
    add(name, gram(entries), message)
for name, mean in (("means", MEAN + 3), ("a mean", put(MEAN, 3, 9.0))):
    add(f"{name} beyond the gram", gram(GRAM, input_mean=mean), "its square exceeds")
add(
    "pruned means beyond the gram",
    gram(GRAM, input_mean=MEAN, pruned_input_mean=MEAN + 3),
    "its square exceeds",
)
add("inputs are zero", with_part("pruned", lambda x: 0 * x), "gram is zero")
add(
    "dead inputs",
    lambda dtype: Sample(torch.ones(8, 8, dtype=dtype), torch.zeros(8, 8, dtype=dtype)),
    "is zero",
)

# -- the range of numbers --------------------------------------------------------------


def scaled(weight: float, inputs: float) -> Callable[[torch.dtype], Sample]:
    layer = make_layer(1)
    return lambda _: of(replace(layer, weight=layer.weight * weight).scaled(inputs))


add("weights of 1e-310", scaled(1e-310, 1), "underflow: multiply the weight")
add("weights of 1e200", scaled(1e200, 1), "overflow: multiply the weight")
add("inputs of 1e-310", scaled(1, 1e-310), "underflow (below 1e-140)")
add("inputs of 1e200", scaled(1, 1e200), "gram contains inf")
add("outputs of 1e-200", scaled(1e-100, 1e-100), "outputs W X reach")

# -- patterns and damping --------------------------------------------------------------


def refused(value: Any) -> Any:
    """Value of a wrong type, as type checkers shall not see it."""
    return value


def pattern(make: Any) -> Callable[[torch.dtype], Sample]:
    return lambda dtype: of(layer_of(dtype), pattern=make)


SPARSITIES: tuple[Any, ...] = (-0.1, 1, 1.5, 50, math.nan, "0.5", None)
for sparsity in SPARSITIES:
    message = "sparsity must" + (" be a number" if sparsity in ("0.5", None) else " lie in")
    add(
        f"impossible sparsity {sparsity!r}",
        pattern(lambda s=sparsity: Unstructured(refused(s))),
        message,
    )
for form in (None, "half", True, [2, 4], "5:4", 1.5):
    message = {"half": "is a fraction", "5:4": "0 < n <= m", 1.5: "lie in"}.get(
        form if isinstance(form, str | float) else None, "pattern must be"
    )
    add(f"pattern {form!r}", pattern(lambda f=form: f), message)
OF_GROUPS: tuple[Any, ...] = ((0, 4), (5, 4), ("2", "4"), (2, 4.0), (2.5, 4))
for n, m in OF_GROUPS:
    message = (
        "0 < n <= m" if isinstance(n, int) and isinstance(m, int) else "must be an integer"
    )
    add(f"{n!r} of {m!r}", pattern(lambda n=n, m=m: NM(n, m)), message)
add("2:5 of 16", pattern(lambda: NM(2, 5)), "needs a width divisible by 5")
COUNTS: tuple[Any, ...] = (0, 17, "3", 2.5, None)
for keep in COUNTS:
    message = "keep must be between" if isinstance(keep, int) else "keep must be an integer"
    add(f"{keep!r} columns", pattern(lambda k=keep: Columns(k)), message)
UNITS: tuple[tuple[str, Any, str], ...] = (
    ("a list", [0] * 16, "got list"),
    ("floats", torch.zeros(16), "got float32"),
    ("short", torch.arange(4), "groups has shape (4,)"),
    ("with gaps", 2 * torch.arange(16), "consecutive integers"),
)
for name, groups, message in UNITS:
    add(f"units are {name}", pattern(lambda g=groups: Columns(2, refused(g))), message)
MASKS: tuple[tuple[str, Any, str], ...] = (
    ("a list", [[True] * 16] * 6, "got list"),
    ("numbers", torch.ones(6, 16), "got float32"),
    ("None", None, "got None"),
    ("transposed", torch.ones(16, 6) > 0, "mask (16, 6) does not fit"),
    ("a vector", torch.ones(16) > 0, "of shape (16,)"),
)
for name, kept, message in MASKS:
    add(f"mask is {name}", pattern(lambda k=kept: FixedMask(refused(k))), message)
for damping in (-1, math.nan, math.inf, None, "0.01", 1e39, True):
    add(
        f"damping {damping!r}",
        lambda dtype, d=damping: of(layer_of(dtype), damping=d),
        "damping must be a number",
    )

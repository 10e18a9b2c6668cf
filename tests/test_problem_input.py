"""Impossible problems are refused, and the message names the fault."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError, LayerwiseError
from layerwise.moments import Moments
from layerwise.patterns import NM, Unstructured
from layerwise.problem import LayerProblem
from tests.support.problems import make_layer

HALF = Unstructured(0.5)
GRAM = torch.eye(4, dtype=torch.float64)
WEIGHT = torch.arange(12, dtype=torch.float64).reshape(3, 4)


def broken(tensor: Tensor, index: tuple[int, int], value: float) -> Tensor:
    copy = tensor.clone()
    copy[index] = value
    return copy


def from_inputs(
    weight: Tensor, inputs: Tensor, other: Tensor | None = None
) -> LayerProblem:
    return LayerProblem.from_inputs(weight, inputs, other, pattern=HALF)


def from_moments(weight: Tensor = WEIGHT, **options: object) -> LayerProblem:
    moments = Moments(GRAM)
    return LayerProblem.from_moments(weight, moments, **{"pattern": HALF, **options})  # type: ignore[arg-type]


INPUTS = make_layer(1, width=4, tokens=9).inputs
NAN, INF = float("nan"), float("inf")
INVALID: dict[str, tuple[Callable[[], LayerProblem], str]] = {
    "nan weight": (
        lambda: from_moments(broken(WEIGHT, (2, 1), NAN)),
        "weight contains nan at row 2, column 1",
    ),
    "inf weight": (
        lambda: from_moments(broken(WEIGHT, (0, 3), -INF)),
        "weight contains -inf at row 0, column 3",
    ),
    "integer weight": (
        lambda: from_moments(WEIGHT.int()),
        "weight must be a dense tensor of float64, float32, bfloat16 or float16",
    ),
    "complex weight": (
        lambda: from_moments(WEIGHT.to(torch.complex128)),
        "weight must be a dense tensor of float64, float32, bfloat16 or float16",
    ),
    "weight is a vector": (
        lambda: from_moments(WEIGHT[0]),
        "shape (4,), expected (out, 4)",
    ),
    "weight too wide": (
        lambda: from_moments(torch.ones(3, 5)),
        "weight has shape (3, 5), expected (out, 4)",
    ),
    "weight without rows": (
        lambda: from_moments(WEIGHT[:0]),
        "weight has shape (0, 4), expected (out, 4)",
    ),
    "pattern does not fit": (
        lambda: LayerProblem.from_moments(
            torch.ones(2, 126), Moments(torch.eye(126)), pattern=NM(2, 4)
        ),
        "pattern 2:4 needs a width divisible by 4, but the weight has 126 columns",
    ),
    "negative damping": (
        lambda: from_moments(damping=-0.1),
        "damping must be a number >= 0, got -0.1",
    ),
    "nan damping": (lambda: from_moments(damping=NAN), "number >= 0, got nan"),
    "infinite damping": (lambda: from_moments(damping=INF), "and at most 1e+30, got inf"),
    "energy of wrong length": (
        lambda: from_moments(energy=torch.ones(4)),
        "energy has shape (4,), expected (3,)",
    ),
    "negative energy": (
        lambda: from_moments(energy=torch.tensor([1.0, -1.0, 0.0])),
        "negative or non-finite",
    ),
    "nan energy": (
        lambda: from_moments(energy=torch.tensor([1.0, NAN, 0.0])),
        "negative or non-finite",
    ),
    "energy is missing": (
        lambda: LayerProblem.from_moments(WEIGHT, Moments(GRAM, GRAM), pattern=HALF),
        "dense and pruned inputs differ, so the energy cannot be rebuilt",
    ),
    "inputs are transposed": (
        lambda: from_inputs(WEIGHT, INPUTS.T),
        "inputs must be (in, tokens) for a weight (out, in), got inputs (9, 4)",
    ),
    "pruned inputs are transposed": (
        lambda: from_inputs(WEIGHT, INPUTS, INPUTS.T),
        "pruned inputs have shape (9, 4), the inputs (4, 9)",
    ),
    "more pruned inputs": (
        lambda: from_inputs(WEIGHT, INPUTS, torch.cat([INPUTS, INPUTS], dim=1)),
        "pruned inputs have shape (4, 18), the inputs (4, 9)",
    ),
    "no tokens": (
        lambda: from_inputs(WEIGHT, INPUTS[:, :0]),
        "no tokens were added; the calibration data are empty",
    ),
    "dead inputs": (lambda: from_inputs(WEIGHT, 0 * INPUTS), "gram is zero"),
    "nan input": (
        lambda: from_inputs(WEIGHT, broken(INPUTS, (2, 7), NAN)),
        "inputs contain nan at token 7, channel 2",
    ),
    "inf pruned input": (
        lambda: from_inputs(WEIGHT, INPUTS, broken(INPUTS, (3, 0), INF)),
        "pruned inputs contain inf at token 0, channel 3",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_problems_are_refused_by_name(case: str) -> None:
    build, message = INVALID[case]
    with pytest.raises(InvalidProblemError, match=re.escape(message)) as caught:
        build()
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, LayerwiseError)
    assert "\n" not in str(caught.value)

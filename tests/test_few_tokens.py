"""Few tokens: an error far below the rounding of float32 is reported to its digits."""

from importlib import import_module

import pytest
import torch

import layerwise as lw
from layerwise.accumulator import FEW_TOKENS, MomentAccumulator
from layerwise.patterns import Unstructured
from layerwise.problem import LayerProblem
from tests.support.problems import make_layer
from tests.support.tolerances import FEW_TOKENS_ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drift", [0.0, 1e-5])
@pytest.mark.parametrize("tokens", [1, 8, 30])
def test_error_of_few_tokens_has_its_digits(
    dtype: torch.dtype, drift: float, tokens: int
) -> None:
    """Fewer tokens than kept weights are fitted far below the rounding of float32."""
    layer = make_layer(87, rows=8, width=64, tokens=tokens).to(torch.float32)
    inputs = layer.inputs.to(dtype)
    other = inputs + drift * layer.inputs.flip(0).to(dtype) if drift else inputs
    problem = LayerProblem.from_inputs(
        layer.weight,
        inputs,
        other if drift else None,
        pattern=Unstructured(0.5),
        damping=1e-4,
    )
    found = lw.solve(problem, "wanda+least-squares")
    dense, pruned = layer.weight.double(), found.weight.double()
    outputs = dense @ inputs.double()
    missed = outputs - pruned @ other.double()
    expected = float(missed.norm() / outputs.norm())
    assert expected < 3e-3
    assert found.relative_error == pytest.approx(expected, rel=FEW_TOKENS_ERROR)


def test_only_few_tokens_are_multiplied_in_float64(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.dtype] = []
    module = import_module("layerwise.accumulator")
    monkeypatch.setattr(
        module, "add_gram", lambda total, chunk, scale: seen.append(chunk.values.dtype)
    )
    accumulator = MomentAccumulator(64)
    for count in (8, 56, 1, 64):
        accumulator.update(torch.ones(count, 64))
    assert seen == [torch.float64, torch.float64, torch.float32, torch.float32]
    wide = MomentAccumulator(2 * FEW_TOKENS)
    wide.update(torch.ones(FEW_TOKENS + 1, 2 * FEW_TOKENS))
    assert seen[-1] == torch.float32

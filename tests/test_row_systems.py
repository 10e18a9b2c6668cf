"""Systems of rows, from the gram on supports and from its inverse on complements."""

import pytest
import torch

from layerwise.solvers.refit.row_systems import (
    one_by_one,
    solve_on_complements,
    solve_on_supports,
)
from tests.support.problems import make_layer
from tests.support.tolerances import CLOSED_FORM


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_sides_solve_the_same_systems(dtype: torch.dtype) -> None:
    layer = make_layer(90, rows=8, width=20, tokens=80)
    gram = layer.inputs @ layer.inputs.T / 80 + 0.1 * torch.eye(20, dtype=torch.float64)
    kept = make_layer(91, rows=8, width=20).weight > -0.5
    kept[0], kept[1] = True, False
    sides = torch.where(kept, layer.weight, 0)
    on_supports = solve_on_supports(gram.to(dtype), kept)(sides)
    inverse = torch.linalg.inv(gram).to(dtype)
    on_complements = solve_on_complements(inverse, kept)(sides)
    limit = CLOSED_FORM[dtype] * float(on_supports.abs().max())
    for found in (on_supports, on_complements):
        assert not found[~kept].any()
        rest = torch.where(kept, sides - found @ gram, 0)
        torch.testing.assert_close(rest, 0 * rest, rtol=0, atol=limit)


def test_nothing_removed_at_all() -> None:
    gram = torch.diag(torch.arange(1.0, 5.0, dtype=torch.float64))
    everything = torch.ones(3, 4, dtype=torch.bool)
    sides = make_layer(92, rows=3, width=4).weight
    found = solve_on_complements(torch.linalg.inv(gram), everything)(sides)
    torch.testing.assert_close(found, sides / gram.diagonal())
    assert not solve_on_supports(gram, ~everything)(sides).any()


def test_systems_are_factored_alike_one_by_one() -> None:
    generator = torch.Generator().manual_seed(4)
    half = torch.randn(5, 6, 6, generator=generator)
    systems = half @ half.mT + torch.eye(6)
    systems[2] -= 9 * torch.eye(6)  # indefinite
    expected = torch.linalg.cholesky_ex(systems)
    lower, info = one_by_one(systems)
    good = info == 0
    assert torch.equal(good, expected[1] == 0)
    assert good.tolist() == [True, True, False, True, True]
    torch.testing.assert_close(lower[good], expected[0][good])

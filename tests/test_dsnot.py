"""DSnoT: mean residuals by their definition, and exchanges that lower them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import layerwise as lw
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.dsnot import DSnoT, mean_residual
from tests.support.problems import Layer, make_layer
from tests.support.tolerances import CLOSED_FORM, ROUNDING

PATTERNS = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4), NM(1, 4)]
EAGER = DSnoT(tolerance=0.0)


def with_means(seed: int, drift: float = 0.3, **shape: Any) -> Layer:
    """Layer whose channels have means of the size of their deviations."""
    layer = make_layer(seed, drift=drift, **shape)
    generator = torch.Generator().manual_seed(seed)
    width = layer.shape[1]
    offset = torch.randn(width, 1, generator=generator, dtype=torch.float64)
    other = layer.pruned_inputs
    return Layer(
        layer.weight,
        layer.inputs + offset,
        None if other is None else other + 1.1 * offset,
    )


def residual_by_definition(layer: Layer, mask: Tensor) -> Tensor:
    """Mean over tokens of ``W X - What Xhat``, row by row."""
    outputs = layer.weight @ layer.inputs
    return (outputs - torch.where(mask, layer.weight, 0) @ layer.seen).mean(dim=1)


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_mean_residual_is_that_of_the_outputs(drift: float) -> None:
    layer = with_means(1, drift)
    problem = layer.problem(Unstructured(0.5))
    mask = lw.solve(problem, "wanda").mask
    torch.testing.assert_close(
        mean_residual(problem, mask),
        residual_by_definition(layer, mask),
        rtol=0,
        atol=CLOSED_FORM[torch.float64],
    )


@given(seed=st.integers(0, 2**32 - 1), drift=st.sampled_from([0.0, 0.3]), data=st.data())
def test_mean_residual_never_grows(seed: int, drift: float, data: st.DataObject) -> None:
    layer = with_means(seed, drift, rows=3, width=8, tokens=20)
    problem = layer.problem(data.draw(st.sampled_from(PATTERNS)))
    before = residual_by_definition(layer, lw.solve(problem, "wanda").mask).abs()
    after = residual_by_definition(layer, lw.solve(problem, EAGER).mask).abs()
    assert bool((after <= before + ROUNDING * layer.energy).all())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_mean_residual_falls(pattern: Pattern) -> None:
    layer = with_means(2, rows=12, width=32, tokens=100)
    problem = layer.problem(pattern)
    start = lw.solve(problem, "wanda").mask
    before = residual_by_definition(layer, start).abs()
    solution = lw.solve(problem, EAGER)
    after = residual_by_definition(layer, solution.mask).abs()
    assert solution.stats["exchanges"] > 0
    assert float(after.sum()) < 0.8 * float(before.sum())
    assert int((after < before).sum()) == int((solution.mask != start).any(dim=1).sum()) > 3
    assert torch.equal(solution.weight, torch.where(solution.mask, layer.weight, 0))


def first_exchange(layer: Layer, mask: Tensor, row: int, m: int) -> tuple[int, int]:
    """Weights that the first cycle of a row restores and removes, entry by entry."""
    weight, seen = layer.weight[row], layer.seen
    sign = float(residual_by_definition(layer, mask)[row].sign())
    means, variances = seen.mean(dim=1), seen.var(dim=1, correction=0)

    def gain(column: int) -> float:
        return sign * float(weight[column] * means[column])

    def score(column: int) -> float:
        return float(weight[column].abs() * seen[column].norm())

    kept = [j for j in range(len(weight)) if mask[row, j] and gain(j) <= 0]
    removed = [
        j
        for j in range(len(weight))
        if not mask[row, j] and gain(j) > 0 and any(k // m == j // m for k in kept)
    ]
    grown = max(removed, key=lambda j: gain(j) / float(variances[j]))
    return grown, min((k for k in kept if k // m == grown // m), key=score)


@pytest.mark.parametrize(("pattern", "m"), [(Unstructured(0.5), 32), (NM(2, 4), 4)])
def test_first_cycle_by_hand(pattern: Pattern, m: int) -> None:
    layer = with_means(3, rows=12, width=32, tokens=100)
    problem = layer.problem(pattern)
    start = lw.solve(problem, "wanda").mask
    mask = lw.solve(problem, DSnoT(tolerance=0.0, max_cycles=1)).mask
    changed = (mask != start).any(dim=1).nonzero()[:, 0].tolist()
    assert len(changed) > 4
    for row in changed:
        grown, pruned = first_exchange(layer, start, row, m)
        expected = start[row].clone()
        expected[grown], expected[pruned] = True, False
        assert torch.equal(mask[row], expected)


def test_variance_power_matters() -> None:
    layer = with_means(4, rows=12, width=32, tokens=100)
    sizes = torch.linspace(0.1, 3, 32, dtype=torch.float64)
    mean = layer.inputs.mean(dim=1, keepdim=True)
    layer = Layer(layer.weight, mean + (layer.inputs - mean) * sizes[:, None])
    problem = layer.problem(Unstructured(0.5))
    masks = [
        lw.solve(problem, DSnoT(tolerance=0.0, variance_power=power)).mask
        for power in (0.0, 1.0)
    ]
    assert not torch.equal(*masks)


def test_rows_are_left_alone_below_the_tolerance() -> None:
    layer = with_means(5, rows=12, width=32, tokens=100)
    problem = layer.problem(Unstructured(0.5))
    start = lw.solve(problem, "wanda").mask
    size = (layer.weight @ layer.inputs).square().mean(dim=1).sqrt()
    shares = residual_by_definition(layer, start).abs() / size
    limit = float(shares.median())
    mask = lw.solve(problem, DSnoT(tolerance=limit)).mask
    moved = (mask != start).any(dim=1)
    assert moved.any()
    assert not moved[shares <= limit].any()
    for idle in (DSnoT(tolerance=1e3), DSnoT(max_cycles=0)):
        assert torch.equal(lw.solve(problem, idle).mask, start)


def test_starts_from_the_mask_of_the_step_before() -> None:
    layer = with_means(6, rows=12, width=32, tokens=100)
    problem = layer.problem(Unstructured(0.5, "layer"))
    start = lw.solve(problem, "sparsegpt")
    solution = lw.solve(problem, lw.chain("sparsegpt", EAGER))
    assert torch.equal(solution.mask.sum(dim=1), start.mask.sum(dim=1))
    assert not torch.equal(solution.mask, start.mask)
    after = residual_by_definition(layer, solution.mask).abs()
    assert bool((after <= residual_by_definition(layer, start.mask).abs()).all())
    assert torch.equal(solution.weight, torch.where(solution.mask, layer.weight, 0))


def test_a_bias_leaves_nothing_to_edit() -> None:
    problem = with_means(7).problem(Unstructured(0.5)).centered()
    assert torch.equal(lw.solve(problem, EAGER).mask, lw.solve(problem, "wanda").mask)


@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_channel_without_variance(constant: float) -> None:
    layer = with_means(8, 0.0, rows=12, width=32, tokens=100)
    inputs = layer.inputs.clone()
    inputs[3] = constant
    problem = replace(layer, inputs=inputs).problem(Unstructured(0.5))
    mask = lw.solve(problem, EAGER).mask
    assert bool(mask[:, 3].any()) == (constant != 0)


def test_means_are_needed() -> None:
    layer = with_means(9)
    problem = layer.problem(Unstructured(0.5))
    same = lw.Moments(problem.gram)
    bare = LayerProblem.from_moments(layer.weight, same, pattern=problem.pattern)
    with pytest.raises(InvalidProblemError, match="give its Moments input_mean"):
        lw.solve(bare, "dsnot")
    one = lw.Moments(problem.gram, problem.cross_gram, problem.moments.input_mean)
    with pytest.raises(InvalidProblemError, match="pruned_input_mean as well"):
        lw.solve(replace(problem, moments=one), "dsnot")


@pytest.mark.parametrize(
    "pattern", [Columns(8), FixedMask(torch.ones(6, 16, dtype=torch.bool))], ids=str
)
def test_patterns_without_exchanges(pattern: Pattern) -> None:
    with pytest.raises(InvalidProblemError, match="dsnot does not handle the pattern"):
        lw.solve(with_means(10).problem(pattern), "dsnot")


@pytest.mark.parametrize(
    "options",
    [{"max_cycles": -1}, {"tolerance": float("nan")}, {"variance_power": -1.0}],
    ids=str,
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        DSnoT(**options)

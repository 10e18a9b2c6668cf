"""What must not change the answer of a solver: repetition, units, order and precision."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

import layerwise as lw
from layerwise.evaluate import objective_rows
from layerwise.patterns import FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solve import SCALED_FIGURES
from layerwise.solvers import SOLVERS
from tests.support.contract import (
    ANY_COLUMN_ORDER,
    CASES,
    ROW_BY_ROW,
    bits,
    every_solver,
    for_solver,
    posable,
    posed,
    repeated_case,
    solved,
)
from tests.support.problems import PATTERNS, PROBLEMS, make_layer
from tests.support.tolerances import EQUIVARIANCE, MASK_DISAGREEMENT, ROUNDING

# -- repetition and place ---------------------------------------------------------------


@repeated_case
def test_same_bits_again_and_inputs_untouched(
    solver: str, problem: str, pattern: str
) -> None:
    first, question = solved(solver, problem, pattern), posed(problem, pattern)
    tensors = [question.weight, question.gram, question.cross_gram, question.energy]
    if isinstance(question.pattern, FixedMask):
        tensors.append(question.pattern.kept)
    before = [tensor.clone() for tensor in tensors]
    random_state = torch.get_rng_state()
    second = lw.solve(question, solver)
    assert torch.equal(bits(first.weight), bits(second.weight))
    assert torch.equal(first.mask, second.mask)
    assert (first.objective, first.status) == (second.objective, second.status)
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(bits(old), bits(new))
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("solver", "problem", "pattern"),
    [case for case in CASES if case.values[1] in ("drifted", "half-precision")],
)
def test_new_tensors_are_made_where_the_layer_is(
    solver: str, problem: str, pattern: str
) -> None:
    """A tensor made without a device would land on another one here, as on CUDA."""
    question = posed(problem, pattern)
    expected = lw.solve(question, solver)
    with torch.device("meta"):
        found = lw.solve(question, solver)
    assert torch.equal(found.weight, expected.weight)


# -- units -----------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["drifted", "drifted-float32"])
@pytest.mark.parametrize(
    ("solver", "pattern"), posable(SOLVERS, ("row-0.5", "layer-0.7", "2:4", "fixed"))
)
def test_scaling_inputs_by_a_power_of_two_keeps_every_bit(
    solver: str, problem: str, pattern: str
) -> None:
    layer = PROBLEMS[problem]
    question = for_solver(solver, layer, PATTERNS[pattern](layer))
    expected = lw.solve(question, solver)
    assert expected.mask.any()
    for exponent in (-50, 1, 49):
        scaled = layer.scaled(2.0**exponent).problem(question.pattern)
        found = lw.solve(scaled, solver)
        assert torch.equal(bits(found.weight), bits(expected.weight))
        assert found.objective == expected.objective * 4.0**exponent
        assert found.relative_error == expected.relative_error
        for entry, other in zip(expected.history, found.history, strict=True):
            scaled_figures = {
                name: value * 4.0**exponent if name in SCALED_FIGURES else value
                for name, value in entry.items()
            }
            assert other == scaled_figures


@every_solver
def test_scaling_weights_by_a_power_of_two_keeps_the_mask(solver: str) -> None:
    layer = PROBLEMS["drifted-float32"]
    question = for_solver(solver, layer, Unstructured(0.5))
    expected = lw.solve(question, solver)
    for exponent in (-40, 40):
        scaled = replace(layer, weight=layer.weight * 2.0**exponent)
        found = lw.solve(scaled.problem(question.pattern), solver)
        assert torch.equal(found.mask, expected.mask)


@every_solver
def test_grams_of_any_magnitude(solver: str) -> None:
    layer = PROBLEMS["plain"]
    question = for_solver(solver, layer, Unstructured(0.5))
    expected = lw.solve(question, solver)
    for magnitude in (2.0**-100, 2.0**100):  # 1e-30, 1e30
        root = magnitude**0.5
        moments = lw.Moments(
            question.gram * magnitude, input_mean=layer.inputs.mean(dim=1) * root
        )
        scaled = LayerProblem.from_moments(
            layer.weight,
            moments,
            pattern=question.pattern,
            gradient_norm=layer.gradient_norm * root,
        )
        found = lw.solve(scaled, solver)
        assert torch.equal(bits(found.weight), bits(expected.weight))


def test_iterations_are_reported_in_units_of_the_problem() -> None:
    problem = PROBLEMS["plain"].scaled(2.0**20).problem(Unstructured(0.5))
    seen: list[Mapping[str, float]] = []
    solution = lw.solve(problem, "fista", on_iteration=seen.append)
    assert seen
    assert list(solution.history) == seen
    best = float(objective_rows(problem, solution.weight, damped=True).sum())
    assert best <= min(entry["objective"] for entry in seen) * (1 + ROUNDING)
    assert best >= min(entry["objective"] for entry in seen) / 2


# -- order -----------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("pattern", ["row-0.5", "layer-0.7", "2:4"])
def test_permuting_rows_permutes_the_answer(solver: str, pattern: str) -> None:
    layer = PROBLEMS["drifted"]
    question = for_solver(solver, layer, PATTERNS[pattern](layer))
    expected = lw.solve(question, solver)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = question.pattern
    if isinstance(permuted, FixedMask):
        permuted = FixedMask(permuted.kept[order])
    found = lw.solve(layer.rows(order).problem(permuted), solver)
    assert torch.equal(found.mask, expected.mask[order])
    torch.testing.assert_close(
        found.weight, expected.weight[order], rtol=0, atol=EQUIVARIANCE
    )


@pytest.mark.parametrize("solver", ANY_COLUMN_ORDER)
@pytest.mark.parametrize("pattern", ["row-0.5", "layer-0.7"])
def test_permuting_columns_permutes_the_answer(solver: str, pattern: str) -> None:
    layer = PROBLEMS["drifted"]
    question = for_solver(solver, layer, PATTERNS[pattern](layer))
    expected = lw.solve(question, solver)
    order = torch.randperm(layer.shape[1], generator=torch.Generator().manual_seed(3))
    permuted = question.pattern
    if isinstance(permuted, FixedMask):
        permuted = FixedMask(permuted.kept[:, order])
    found = lw.solve(layer.columns(order).problem(permuted), solver)
    assert torch.equal(found.mask, expected.mask[:, order])
    torch.testing.assert_close(
        found.weight, expected.weight[:, order], rtol=0, atol=EQUIVARIANCE
    )


@pytest.mark.parametrize(
    ("solver", "pattern"), posable(ROW_BY_ROW, ("row-0.5", "2:4", "fixed"))
)
def test_rows_alone_and_together(solver: str, pattern: str) -> None:
    layer = PROBLEMS["drifted"]
    question = for_solver(solver, layer, PATTERNS[pattern](layer))
    expected = lw.solve(question, solver)
    for row in range(len(layer.weight)):
        order = torch.tensor([row])
        own = question.pattern
        own = FixedMask(own.kept[order]) if isinstance(own, FixedMask) else own
        found = lw.solve(layer.rows(order).problem(own), solver)
        assert torch.equal(found.mask, expected.mask[order])
        torch.testing.assert_close(
            found.weight, expected.weight[order], rtol=0, atol=EQUIVARIANCE
        )


# -- precision -------------------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("drift", [0.0, 0.3])
@pytest.mark.parametrize("pattern", ["row-0.5", "layer-0.7", "2:4"])
def test_masks_agree_between_precisions(solver: str, drift: float, pattern: str) -> None:
    single = make_layer(17, rows=32, width=64, tokens=256, drift=drift).to(torch.float32)
    double = single.to(torch.float64)
    question = for_solver(solver, double, PATTERNS[pattern](double))
    expected = lw.solve(question, solver).mask
    found = lw.solve(single.problem(question.pattern), solver).mask
    assert float((found != expected).double().mean()) <= MASK_DISAGREEMENT

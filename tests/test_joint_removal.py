"""The closed form of a joint removal against normal equations and CLARABEL."""

import pytest
import torch

from layerwise.errors import MemoryBudgetError
from layerwise.evaluate import objective_rows
from layerwise.patterns import Unstructured
from layerwise.solvers.refit.joint_removal import remove_jointly
from tests.support.problems import DOUBLE, PROBLEMS, make_layer, uneven_mask
from tests.support.reference import Equations, hessian_and_start
from tests.support.tolerances import CLOSED_FORM, EQUIVARIANCE, REFIT_REFERENCE, ROUNDING


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PROBLEMS)
def test_closed_form_solves_the_restricted_normal_equations(
    name: str, dtype: torch.dtype
) -> None:
    layer = PROBLEMS[name].to(torch.float64)
    gram, start = hessian_and_start(layer, 0.1)
    mask = uneven_mask(layer)
    inverse = torch.linalg.inv(gram)
    found, _ = remove_jointly(start.to(dtype), inverse.to(dtype), mask)
    assert found.dtype == dtype
    expected = torch.zeros_like(start)
    for row, kept in enumerate(mask):
        side = (start @ gram)[row, kept]
        expected[row, kept] = torch.linalg.solve(gram[kept][:, kept], side)
    limit = CLOSED_FORM[dtype] * float(expected.abs().max() + start.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=limit)
    assert not found[~mask].any()


@pytest.mark.parametrize("damping", [1e-6, 0.01])
@pytest.mark.parametrize("name", DOUBLE)
def test_closed_form_against_clarabel(name: str, damping: float) -> None:
    layer = PROBLEMS[name]
    gram, start = hessian_and_start(layer, damping)
    mask = uneven_mask(layer, seed=1)
    found, _ = remove_jointly(start, torch.linalg.inv(gram), mask)
    equations = Equations(layer, damping)
    reference = equations.objective_rows(equations.clarabel_refit(mask)).sum()
    slack = REFIT_REFERENCE * layer.energy
    assert equations.objective(found) == pytest.approx(reference, abs=slack, rel=0)


@pytest.mark.parametrize("name", DOUBLE)
def test_loss_is_the_measured_increase(name: str) -> None:
    layer = PROBLEMS[name]
    gram, start = hessian_and_start(layer, 0.01)
    mask = uneven_mask(layer)
    found, loss = remove_jointly(start, torch.linalg.inv(gram), mask)
    problem = layer.problem(Unstructured(0))
    value, minimum = (
        objective_rows(problem, weight, damped=True) for weight in (found, start)
    )
    slack = CLOSED_FORM[torch.float64] * layer.energy
    torch.testing.assert_close(value - minimum, loss, rtol=0, atol=slack)
    assert torch.equal(loss > 0, ~mask.all(dim=1))


def test_one_weight_is_the_optimal_brain_surgeon() -> None:
    layer = PROBLEMS["correlated"]
    gram, start = hessian_and_start(layer, 0.01)
    inverse = torch.linalg.inv(gram)
    mask = torch.ones(layer.shape, dtype=torch.bool)
    mask[:, 3] = False
    found, loss = remove_jointly(start, inverse, mask)
    gone = start[:, 3]
    expected = start - torch.outer(gone / inverse[3, 3], inverse[3])
    torch.testing.assert_close(found, expected, rtol=0, atol=EQUIVARIANCE)
    torch.testing.assert_close(loss, gone.square() / inverse[3, 3], rtol=ROUNDING, atol=0)


def test_order_of_the_removed_weights_is_no_part_of_it() -> None:
    layer = PROBLEMS["drifted"]
    gram, start = hessian_and_start(layer, 0.01)
    inverse, mask = torch.linalg.inv(gram), uneven_mask(layer)
    expected, loss = remove_jointly(start, inverse, mask)
    order = torch.randperm(layer.shape[1], generator=torch.Generator().manual_seed(5))
    turned = remove_jointly(start[:, order], inverse[order][:, order], mask[:, order])
    torch.testing.assert_close(turned[0], expected[:, order], rtol=0, atol=EQUIVARIANCE)
    torch.testing.assert_close(turned[1], loss, rtol=EQUIVARIANCE, atol=EQUIVARIANCE)


def test_weights_that_are_zero_are_removed_by_index() -> None:
    """Picking removed weights by value would shift them against their matrix."""
    layer = PROBLEMS["correlated"]
    gram, start = hessian_and_start(layer, 0.01)
    start[:, 4] = 0
    mask = torch.ones(layer.shape, dtype=torch.bool)
    mask[:, [4, 6, 7]] = False
    found, _ = remove_jointly(start, torch.linalg.inv(gram), mask)
    kept = mask[0]
    expected = torch.linalg.solve(gram[kept][:, kept], (start @ gram)[:, kept], left=False)
    torch.testing.assert_close(found[:, kept], expected, rtol=0, atol=EQUIVARIANCE)


def test_removing_one_of_two_equal_inputs_costs_the_damping_alone() -> None:
    layer, damping = PROBLEMS["duplicate-channel"], 1e-6
    gram, start = hessian_and_start(layer, damping)
    mask = torch.ones(layer.shape, dtype=torch.bool)
    mask[:, 9] = False
    found, loss = remove_jointly(start, torch.linalg.inv(gram), mask)
    ridge = layer.problem(Unstructured(0), damping).ridge
    # moving the weight to its twin changes two weights by as much
    assert bool((loss <= 2 * ridge * start[:, 9].square() * (1 + EQUIVARIANCE)).all())
    moved = start[:, 2] + start[:, 9]
    torch.testing.assert_close(found[:, 2], moved, rtol=0, atol=10 * damping)


def test_memory_budget_changes_the_chunks_and_not_the_answer() -> None:
    layer = make_layer(71, rows=12, drift=0.2)
    gram, start = hessian_and_start(layer, 0.01)
    inverse, mask = torch.linalg.inv(gram), uneven_mask(layer)
    whole, loss = remove_jointly(start, inverse, mask)
    for budget in (3 * 16**2 * 8, 3 * 16**2 * 40):  # one row, five rows
        parts, of_parts = remove_jointly(start, inverse, mask, budget)
        torch.testing.assert_close(parts, whole, rtol=0, atol=EQUIVARIANCE)
        torch.testing.assert_close(of_parts, loss, rtol=EQUIVARIANCE, atol=EQUIVARIANCE)
    with pytest.raises(
        MemoryBudgetError, match=r"needs 6144 bytes.* budget is 6143; raise"
    ):
        remove_jointly(start, inverse, mask, 6143)

"""Every solver on CUDA against the same problem in float64 on the CPU."""

import pytest
import torch

import layerwise as lw
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Status
from layerwise.solvers import SOLVERS, get_solver
from layerwise.solvers.lasso import lasso
from tests.problems import Layer, make_layer
from tests.tolerances import GPU_OBJECTIVE, L1_REFERENCE

pytestmark = pytest.mark.gpu

LAYERS = {
    "same inputs": make_layer(101, rows=48, width=96, tokens=400, correlation=0.8),
    "drifted": make_layer(102, rows=48, width=96, tokens=400, drift=0.2, correlation=0.8),
}
PATTERNS = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4)]


def to_cuda(layer: Layer, dtype: torch.dtype) -> Layer:
    other = layer.pruned_inputs
    return Layer(
        layer.weight.to("cuda", dtype),
        layer.inputs.to("cuda", dtype),
        None if other is None else other.to("cuda", dtype),
    )


def for_solver(solver: str, problem: LayerProblem, pattern: Pattern) -> LayerProblem:
    if get_solver(solver).can_solve(problem):
        return problem
    fixed = problem.with_pattern(FixedMask(pattern.mask(problem.weight.abs())))
    if get_solver(solver).can_solve(fixed):
        return fixed
    return problem.with_pattern(Columns(problem.shape[1] // 2))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_solver_on_cuda(
    solver: str, name: str, pattern: Pattern, dtype: torch.dtype
) -> None:
    layer = LAYERS[name]
    reference = for_solver(solver, layer.problem(pattern), pattern)
    expected = lw.solve(reference, solver)
    found = lw.solve(
        for_solver(solver, to_cuda(layer, dtype).problem(pattern), pattern), solver
    )
    assert found.weight.is_cuda
    assert found.mask.is_cuda
    assert found.weight.dtype == dtype
    assert found.status is expected.status
    assert found.status is not Status.NUMERICAL_ERROR
    assert reference.pattern.accepts(found.mask.cpu())
    assert not found.weight[~found.mask].any()
    bias = None if found.bias is None else found.bias.cpu()
    value = float(objective_rows(reference, found.weight.cpu(), bias=bias).sum())
    slack = GPU_OBJECTIVE[dtype] * layer.energy
    assert found.objective == pytest.approx(value, abs=slack, rel=0)
    assert value == pytest.approx(expected.objective, abs=slack, rel=0)


@pytest.mark.parametrize("name", LAYERS)
def test_lasso_on_cuda(name: str) -> None:
    layer = LAYERS[name]
    problem = layer.problem(Unstructured(0))
    penalty = 0.2 * float(problem.target.abs().max())
    expected = lasso(problem, penalty, tolerance=L1_REFERENCE)
    on_cuda = to_cuda(layer, torch.float64).problem(Unstructured(0))
    found = lasso(on_cuda, penalty, tolerance=L1_REFERENCE)
    assert found.weight.is_cuda
    assert found.status is expected.status is Status.OPTIMAL
    assert found.primal == pytest.approx(expected.primal, rel=2 * L1_REFERENCE)

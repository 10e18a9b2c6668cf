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
from tests.support.problems import make_layer
from tests.support.tolerances import GPU_OBJECTIVE, L1_REFERENCE

pytestmark = pytest.mark.gpu

LAYERS = {
    "same inputs": make_layer(101, rows=48, width=96, tokens=400, correlation=0.8),
    "drifted": make_layer(102, rows=48, width=96, tokens=400, drift=0.2, correlation=0.8),
}
PATTERNS = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4)]


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
        for_solver(solver, layer.to(dtype).to("cuda").problem(pattern), pattern), solver
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
    on_cuda = layer.to("cuda").problem(Unstructured(0))
    found = lasso(on_cuda, penalty, tolerance=L1_REFERENCE)
    assert found.weight.is_cuda
    assert found.status is expected.status is Status.OPTIMAL
    assert found.primal == pytest.approx(expected.primal, rel=2 * L1_REFERENCE)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("pattern", PATTERNS[:2], ids=str)
def test_long_rows_lose_the_same_entries_on_cuda(rows: int, pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 1 << 20, (rows, 1 << 20), generator=generator).float()
    assert torch.equal(pattern.mask(scores.cuda()).cpu(), pattern.mask(scores))


def test_a_mask_on_the_cpu_serves_a_layer_on_cuda() -> None:
    layer = LAYERS["drifted"]
    mask = FixedMask(Unstructured(0.5).mask(layer.weight.abs()))
    found = lw.solve(layer.to("cuda").problem(mask), "least-squares")
    assert found.status is Status.OPTIMAL
    assert torch.equal(found.mask.cpu(), mask.kept)

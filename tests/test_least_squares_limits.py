"""The refit at the limits of memory, and of the precision of numbers."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import MemoryBudgetError
from layerwise.evaluate import objective_rows
from layerwise.moments import Moments
from layerwise.patterns import FixedMask, Unstructured
from layerwise.planning.dry import LiveBytes
from layerwise.problem import LayerProblem
from layerwise.solution import Status
from layerwise.solvers.fista import Fista
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.refit.conjugate_gradients import SupportSolver
from tests.support.problems import PROBLEMS, Layer, make_layer, uneven_mask
from tests.support.tolerances import EQUIVARIANCE


@pytest.mark.parametrize("method", ["direct", "cg"])
def test_memory_budget_changes_the_chunks_and_not_the_answer(method: Any) -> None:
    layer = make_layer(61, rows=12, drift=0.2)
    problem = layer.problem(FixedMask(uneven_mask(layer)))
    tight = LeastSquares(method=method, tolerance=1e-24)  # else rows stop where they may
    whole = lw.solve(problem, tight)
    for budget in (8_000, 16_000, 60_000):
        parts = lw.solve(problem, replace(tight, memory_budget=budget))
        torch.testing.assert_close(parts.weight, whole.weight, rtol=0, atol=EQUIVARIANCE)
        assert parts.status is Status.OPTIMAL
        assert parts.iterations <= whole.iterations  # of one chunk, not of their sum


def recorded_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """List that gets the numbers of rows that are worked on together."""
    chunks = []
    rows_of = LayerProblem.rows

    def record(self: LayerProblem, selection: Tensor) -> LayerProblem:
        chunks.append(len(selection))
        return rows_of(self, selection)

    monkeypatch.setattr(LayerProblem, "rows", record)
    return chunks


def test_memory_budget_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(61, rows=12, drift=0.2)
    problem = layer.problem(FixedMask(uneven_mask(layer)))
    chunks = recorded_chunks(monkeypatch)
    # a row needs its vectors and three 16 x 16 systems, 7680 bytes
    lw.solve(problem, LeastSquares(method="direct", memory_budget=2 * 7680))
    assert max(chunks) == 2


def test_memory_budget_counts_the_side_that_is_factored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(62, rows=6, width=16)
    problem = layer.problem(FixedMask(Unstructured(0.25).mask(layer.weight.abs())))
    chunks = recorded_chunks(monkeypatch)
    # a row needs its vectors and three 4 x 4 systems, 1920 bytes
    lw.solve(problem, LeastSquares(method="direct", memory_budget=2 * 1920))
    assert max(chunks) == 2


def test_memory_budget_too_small_for_one_row() -> None:
    problem = PROBLEMS["plain"].problem(FixedMask(torch.arange(96).view(6, 16) % 2 == 0))
    # vectors, and three 8 x 8 systems
    with pytest.raises(MemoryBudgetError, match=r"needs 3072 bytes.* budget is 100: raise"):
        lw.solve(problem, LeastSquares(method="direct", memory_budget=100))


@pytest.mark.parametrize("condition", [1e8, 1e10, 1e13])
@pytest.mark.parametrize("seed", [0, 1])
def test_float32_weights_on_a_gram_that_needs_float64(condition: float, seed: int) -> None:
    """The gram rounded to float32 is indefinite, and corrections with it diverge."""
    double = make_layer(seed, rows=8, tokens=64, condition=condition)
    layer = Layer(double.weight.float(), double.inputs)
    mask = Unstructured(0.3).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask), damping=0.0)
    masked = float(objective_rows(problem, torch.where(mask, layer.weight, 0)).sum())
    for method in ("direct", "cg"):
        solver = LeastSquares(method=method)
        assert lw.solve(problem, solver).objective < masked / 10
    fista = lw.solve(problem.with_pattern(Unstructured(0.3)), Fista(max_rounds=3))
    wanda = lw.solve(problem.with_pattern(Unstructured(0.3)), "wanda")
    assert fista.objective < wanda.objective


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("side", "rank"),
    [("support", 0), ("support", 4), ("support", None), ("complement", None)],
)
def test_rounded_products_change_the_way_and_not_the_answer(
    products: Any, side: Any, rank: int | None
) -> None:
    layer = make_layer(64, rows=9, width=96, tokens=400, condition=300, drift=0.1)
    layer = layer.to(torch.float32)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    solver = LeastSquares(method="cg", products=products, side=side, rank=rank)
    solution = lw.solve(problem, solver)
    assert solution.status is Status.OPTIMAL
    exact = lw.solve(problem, LeastSquares(method="direct"))
    value, best = (
        objective_rows(problem, found.weight, damped=True) for found in (solution, exact)
    )
    assert bool((value <= best * (1 + solver.tolerance)).all())


@pytest.mark.parametrize("method", ["auto", "cg"])
@pytest.mark.parametrize("side", ["support", "complement"])
def test_rounding_that_breaks_the_gram_is_noticed(method: Any, side: Any) -> None:
    """A remainder with eigenvalues below the rounding: exact products take over."""
    layer = make_layer(65, rows=9, width=96, tokens=400, condition=1e6).to(torch.float32)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask), damping=1e-7)
    solver = LeastSquares(
        method=method, products="bfloat16", tolerance=1e-6, side=side, rank=0
    )
    start = objective_rows(problem, torch.where(mask, layer.weight, 0), damped=True)
    solution = lw.solve(problem, solver)
    assert solution.status is Status.OPTIMAL
    assert bool((objective_rows(problem, solution.weight, damped=True) < start).all())


def test_what_cg_has_found_is_not_lost_where_direct_does_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make_layer(75, rows=6, width=64, tokens=200)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    problem = layer.problem(FixedMask(mask))
    monkeypatch.setattr(LeastSquares, "_methods", lambda *_: ("cg", "direct"))
    solver = LeastSquares(tolerance=0, memory_budget=25_000)
    found = lw.solve(problem, solver)
    assert found.status is Status.MAX_ITERATIONS
    assert found.certificate is not None
    assert found.certificate.bound < LeastSquares.tolerance
    monkeypatch.setattr(LeastSquares, "_methods", lambda *_: ("direct",))
    with pytest.raises(MemoryBudgetError, match="or use LeastSquares\\(method='cg'\\)"):
        lw.solve(problem, solver)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", ["support", "complement"])
@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_rows_of_cg_fit_what_is_planned_for_them(
    drift: float, side: Any, dtype: torch.dtype
) -> None:
    """A chunk of all rows, against one of half of them."""
    layer = make_layer(78, rows=256, width=128, tokens=400, drift=drift).to(dtype)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    planned, peaks = [], []
    for rows in (128, 256):
        part = replace(layer, weight=layer.weight[:rows])
        problem = part.problem(FixedMask(mask[:rows]))
        _ = problem.target, problem.shift, problem.factor(torch.float64)
        solver = LeastSquares(method="cg", side=side)
        with LiveBytes() as live:
            solver.solve(problem)
        peaks.append(live.peak)
        with pytest.raises(MemoryBudgetError) as caught:
            replace(solver, memory_budget=1).solve(problem)
        planned.append(int(re.findall(r"needs (\d+) bytes", str(caught.value))[0]))
    assert planned[0] == planned[1]
    needed = (peaks[1] - peaks[0]) / 128
    assert 0.7 * planned[0] < needed <= planned[0]


def half_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def precisions_of_cg(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Precisions in which cg is run from here on."""
    used: list[torch.dtype] = []
    original = SupportSolver.solve

    def note(system: SupportSolver, *args: Any, **kwargs: Any) -> Any:
        used.append(system.gram.dtype)
        return original(system, *args, **kwargs)

    monkeypatch.setattr(SupportSolver, "solve", note)
    return used


@pytest.mark.parametrize("method", ["auto", "direct", "cg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-23, -35])
def test_a_channel_below_the_range_of_float32(
    monkeypatch: pytest.MonkeyPatch, method: Any, dtype: torch.dtype, exponent: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 400, generator=generator, dtype=torch.float64)
    inputs[5] *= 10.0**exponent
    weight = torch.randn(4, 128, generator=generator, dtype=dtype)
    mask = half_of(4, 128)
    mask[:, 5] = True
    problem = LayerProblem.from_inputs(weight, inputs, pattern=FixedMask(mask), damping=0.0)
    used = precisions_of_cg(monkeypatch)
    found = lw.solve(problem, LeastSquares(method=method, tolerance=1e-6))
    assert found.status is Status.OPTIMAL
    assert set(used) <= {torch.float64}
    assert bool(used) == (method == "cg")


@pytest.mark.parametrize("method", ["auto", "direct"])
@pytest.mark.parametrize("side", ["support", "complement"])
def test_float64_follows_where_float32_stalls(method: Any, side: Any) -> None:
    """Pivots of 0.1 and more, but a condition of 4e8."""
    generator, n = torch.Generator().manual_seed(1), 16
    below = torch.rand(n, n, generator=generator, dtype=torch.float64) / 2 + 0.5
    lower = torch.eye(n, dtype=torch.float64) - torch.tril(below, -1)
    weight = torch.randn(2, n, generator=generator)
    problem = LayerProblem.from_moments(
        weight, Moments(lower @ lower.T), pattern=FixedMask(half_of(2, n)), damping=0.0
    )
    assert problem.factor(torch.float64).holds_in(torch.float32)
    found = lw.solve(problem, LeastSquares(method=method, side=side, tolerance=1e-6))
    assert found.status is Status.OPTIMAL


@pytest.mark.parametrize("width", [3, 8, 32])
@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_a_model_of_as_many_directions_as_inputs(width: int, damping: float) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(width, width, generator=generator)
    weight = torch.randn(8, width, generator=generator)
    mask = torch.rand(8, width, generator=generator) < 0.3
    problem = LayerProblem.from_inputs(
        weight, inputs, pattern=FixedMask(mask), damping=damping
    )
    solver = LeastSquares(method="cg", side="support", rank=width, tolerance=1e-5)
    assert lw.solve(problem, solver).status is Status.OPTIMAL


@pytest.mark.parametrize(
    ("size", "precisions"),
    [(30, {torch.float32}), (100, {torch.float32, torch.float64})],
)
def test_massive_channels_are_begun_in_float32(
    monkeypatch: pytest.MonkeyPatch, size: float, precisions: set[torch.dtype]
) -> None:
    """Two inputs that are large and nearly the same: pivots that drown in rounding."""
    generator, width = torch.Generator().manual_seed(3), 256
    inputs = torch.randn(width, 2000, generator=generator)
    inputs[7] *= size
    inputs[9] = inputs[7] + 0.1 * inputs[9]
    weight = torch.randn(16, width, generator=generator)
    problem = LayerProblem.from_inputs(
        weight, inputs, pattern=FixedMask(half_of(16, width)), damping=1e-4
    )
    assert not problem.factor(torch.float64).holds_in(torch.float32)
    used = precisions_of_cg(monkeypatch)
    found = lw.solve(problem, LeastSquares(method="cg", tolerance=1e-6))
    assert found.status is Status.OPTIMAL
    assert set(used) == precisions

"""Answers are graded once, and users' own objects are wrapped once."""

import pickle
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import UsageError
from layerwise.foreign import UserSolver
from layerwise.moments import Moments
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.run.pipeline.gradients import GradientStatistic, required_gradient
from layerwise.run.pipeline.matrix import solve_matrix
from layerwise.run.pipeline.method import Method
from layerwise.solution import Answer, Start, mask_of
from layerwise.solve import Chain, resolve
from layerwise.solver import OnIteration, Solver, requirements
from layerwise.solvers import get_solver
from layerwise.solvers.columns import ColumnPruning
from layerwise.solvers.dsnot import DSnoT
from layerwise.solvers.fista import Fista
from layerwise.solvers.frank_wolfe import FrankWolfe
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.sparse_swaps import SparseSwaps
from layerwise.solvers.swaps import Swaps
from layerwise.timing.operations import OperationCount
from layerwise.timing.random_layers import random_gram, random_weight
from tests.support.problems import PROBLEMS

ROWS, WIDTH = 96, 48
HALF = Unstructured(0.5)

# -- one grade -------------------------------------------------------------------------


GRAM = random_gram(WIDTH, torch.device("cpu"), 1)
CROSS = GRAM * (1 + 1e-2 * torch.linspace(-1, 1, WIDTH, dtype=torch.float64))
WEIGHT = random_weight(ROWS, WIDTH, torch.device("cpu"), 0)
DRIFT = torch.full((ROWS,), 1e-2, dtype=torch.float64)


def pose(*, pair: bool, dtype: torch.dtype = torch.float32) -> LayerProblem:
    """Layer as a run poses it, with one stream of inputs or with two."""
    return LayerProblem.from_moments(
        WEIGHT.to(dtype),
        Moments(GRAM, CROSS if pair else None, n_tokens=4096),
        pattern=HALF,
        drift=DRIFT if pair else None,
    )


def products(count: OperationCount) -> float:
    """Float64 operations that were counted, in products (out, in, in)."""
    return count.work.flops.get(torch.float64, 0.0) / (2 * ROWS * WIDTH**2)


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria", "wanda+magnitude"])
def test_a_method_of_scores_pays_for_its_grade_alone(method: str, pair: bool) -> None:
    problem = pose(pair=pair)
    with OperationCount() as count:
        lw.solve(problem, method)
    assert products(count) == 1


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("method", ["sparsegpt", "least-squares", "swaps", "fista"])
def test_a_chain_is_graded_once(method: str, pair: bool) -> None:
    """Beyond what its steps do, whatever that is."""
    problem = pose(pair=pair)
    last = get_solver(method)
    with OperationCount() as count:
        lw.solve(problem, lw.chain("wanda", last))
    problem, _ = pose(pair=pair).normalized()
    with OperationCount() as steps:
        first = get_solver("wanda").solve(problem)
        assert first.mask is not None
        fixed = FixedMask(first.mask) if method == "least-squares" else HALF
        last.solve(problem.with_pattern(fixed), initial=first)
    assert products(count) == pytest.approx(products(steps) + 1)


@pytest.mark.parametrize(
    ("method", "dtype", "grades"),
    [
        ("wanda", torch.bfloat16, 1),
        ("sparsegpt", torch.float32, 1),
        ("sparsegpt", torch.bfloat16, 2),  # what is stored is not what was solved
    ],
)
@pytest.mark.parametrize("pair", [False, True])
def test_products_of_a_matrix_in_a_run(
    method: str, dtype: torch.dtype, grades: int, pair: bool
) -> None:
    with OperationCount() as count:
        solve_matrix(Method(resolve(method)), "layer", lambda: pose(pair=pair, dtype=dtype))
    with OperationCount() as posing:
        problem, _ = pose(pair=pair, dtype=dtype).normalized()
    with OperationCount() as solving:
        resolve(method).solve(problem)
    with OperationCount() as ranking:
        assert pose(pair=pair, dtype=dtype).moments.rank == WIDTH
    rank = products(ranking) - products(posing)  # one factorization
    assert products(posing) == (2 if pair else 1)  # the energy, and how inputs differ
    known = products(posing) + products(solving) + rank
    assert products(count) == pytest.approx(known + grades)


# -- answers ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A solver that leaves its mask to the pattern."""

    weight: Tensor
    name: str = "chosen"

    def can_solve(self, problem: LayerProblem) -> bool:
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        return Answer(self.weight)


@pytest.mark.parametrize("pattern", [NM(2, 4), HALF], ids=str)
def test_a_mask_that_is_left_to_the_pattern(pattern: Pattern) -> None:
    problem = PROBLEMS["drifted"].problem(pattern)
    wanda = lw.solve(problem, "wanda")
    chosen = Chosen(wanda.weight)
    assert torch.equal(lw.solve(problem, chosen).mask, wanda.mask)
    chained = lw.solve(problem, lw.chain(chosen, "least-squares"))
    assert torch.equal(chained.weight, lw.solve(problem, "wanda+least-squares").weight)


@pytest.mark.parametrize(
    ("solver", "pattern"),
    [  # that go nowhere from their start
        (Fista(max_rounds=0), HALF),
        (Swaps(rounds=0), HALF),
        (DSnoT(max_cycles=0), HALF),
        (FrankWolfe(max_iterations=0), HALF),
        (SparseSwaps(rounds=0), NM(2, 4)),
        (ColumnPruning(rounds=0), Columns(6)),
    ],
    ids=lambda value: value.name if isinstance(value, Solver) else str(value),
)
@pytest.mark.parametrize("direct", [False, True])
def test_a_start_without_a_mask(solver: Solver, pattern: Pattern, direct: bool) -> None:
    problem = PROBLEMS["drifted"].problem(pattern)
    weight = problem.weight.roll(3, dims=1)
    mask = pattern.mask(weight.abs())
    bare, full = (
        solver.solve(problem, initial=start).weight
        if direct
        else lw.solve(problem, solver, initial=start).weight
        for start in (Answer(weight), Answer(weight, mask))
    )
    assert torch.equal(bare, full)
    assert not torch.equal(bare, lw.solve(problem, solver).weight)


def test_a_step_that_needs_gradients_leaves_no_graph() -> None:
    problem = PROBLEMS["drifted"].problem(HALF)
    learned = Chosen(torch.nn.Parameter(lw.solve(problem, "wanda").weight))
    assert not lw.solve(problem, lw.chain(learned, "least-squares")).weight.requires_grad


def test_weights_that_are_not_finite_have_a_mask_too() -> None:
    weight = torch.tensor([[float("nan"), 3.0, -2.0, 1.0]])
    mask = mask_of(Answer(weight), NM(2, 4))
    assert mask.tolist() == [[False, True, True, False]]


# -- users' own objects ----------------------------------------------------------------


@dataclass(frozen=True)
class Mine:
    """A user's own method, a dataclass that lacks a name."""

    norm: str = "l2"
    memory_budget: int = 100
    requires: frozenset[str] = frozenset({"gram", "gradient"})

    def solve(self, problem: LayerProblem) -> Any:
        return SimpleNamespace(weight=problem.weight * HALF.mask(problem.weight.abs()))


def test_an_object_is_wrapped_once() -> None:
    solver = resolve(Mine())
    assert isinstance(solver, UserSolver)
    assert isinstance(solver, Solver)
    assert resolve(solver) is solver
    steps = lw.chain(solver, lw.chain(Mine(), "wanda"))
    assert steps.name == "Mine+Mine+wanda"
    assert steps.steps[0] is solver
    assert resolve(steps) is steps
    assert isinstance(steps.steps[1], Chain)
    assert resolve(get_solver("wanda")) == get_solver("wanda")
    for finished in (solver, get_solver("wanda"), steps):
        with pytest.raises(UsageError, match="is a solver already"):
            UserSolver(finished)


def test_a_wrapped_object_is_what_it_was() -> None:
    solver = resolve(Mine("l1"))
    assert solver == resolve(Mine("l1"))
    assert solver != resolve(Mine())
    assert hash(solver) == hash(resolve(Mine("l1")))
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert requirements(solver) == {"gram", "gradient"}
    assert vars(solver) == {"own": Mine("l1")}
    assert required_gradient(solver) == GradientStatistic("l1")
    assert not hasattr(solver, "warm_start")
    problem = PROBLEMS["plain"].problem(HALF)
    assert lw.solve(problem, solver).objective == lw.solve(problem, Mine()).objective


def test_names_of_objects() -> None:
    named: Any = SimpleNamespace(solve=Mine().solve, name=7)
    assert [resolve(method).name for method in ("wanda", Mine(), named)] == [
        *("wanda", "Mine", "7")
    ]


def test_an_object_may_refuse_a_pattern() -> None:
    picky: Any = SimpleNamespace(
        solve=Mine().solve, can_solve=lambda _: False, requires=set()
    )
    with pytest.raises(lw.errors.InvalidProblemError, match="SimpleNamespace does not"):
        lw.solve(PROBLEMS["plain"].problem(HALF), picky)


def test_a_solver_may_return_a_solution() -> None:
    """Its own grades are ignored, and its bias is computed here."""

    class Graded(LeastSquares):
        def solve(self, problem: LayerProblem, **options: Any) -> Any:
            found = lw.solve(problem, "least-squares")
            return replace(found, objective=-1.0, bias=torch.ones(len(problem.weight)))

    layer = PROBLEMS["drifted"]
    problem = layer.problem(FixedMask(HALF.mask(layer.weight.abs())))
    own, ours = lw.solve(problem, Graded()), lw.solve(problem, "least-squares")
    assert torch.equal(own.weight, ours.weight)
    assert own.certificate == ours.certificate
    assert own.stats == ours.stats
    assert own.bias is not None
    explicit = layer.explicit(own.weight, own.bias)
    assert own.objective == pytest.approx(explicit)

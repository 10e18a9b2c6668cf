"""layerwise.solve: users' own solvers, chains, and names."""

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import (
    InvalidProblemError,
    SolveError,
    UsageError,
    VerificationError,
)
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Solution, Start, Status
from layerwise.solver import OnIteration
from layerwise.solvers import get_solver
from tests.support.problems import PROBLEMS
from tests.support.tolerances import EQUIVARIANCE, EXPLICIT

# -- users' own solvers ----------------------------------------------------------------


@dataclass(frozen=True)
class Bare:
    """The least that an object must have: ``solve(problem)`` and ``.weight``."""

    weight: Tensor


class KeepEven:
    """A user's own method: keeps every second input, twice as large."""

    def solve(self, problem: LayerProblem) -> Bare:
        weight = problem.weight.clone()
        weight[:, 1::2] = 0
        return Bare(2 * weight)


class Given:
    """Returns what it was given."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def solve(self, problem: LayerProblem) -> Bare:
        return Bare(self.weight)


def test_users_own_solver() -> None:
    layer = PROBLEMS["drifted"]
    solution = lw.solve(layer.problem(NM(2, 4)), KeepEven())
    assert solution.status is Status.FEASIBLE
    assert solution.certificate is None
    assert solution.mask[:, ::2].all()
    assert not solution.mask[:, 1::2].any()
    slack = EXPLICIT[torch.float64] * layer.energy
    explicit = layer.explicit(solution.weight)
    assert solution.objective == pytest.approx(explicit, abs=slack, rel=0)


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(6, 16, dtype=torch.float64),
        torch.zeros(6, 12, dtype=torch.float64),
        torch.zeros(5, 16, dtype=torch.float64),
    ],
    ids=["dense", "too narrow", "too few rows"],
)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_object_that_breaks_the_pattern(weight: Tensor, pattern: Pattern) -> None:
    problem = PROBLEMS["plain"].problem(pattern)
    with pytest.raises(VerificationError, match="the solver"):
        lw.solve(problem, Given(weight))


@dataclass(frozen=True)
class Claims:
    """An object that brings its own mask."""

    mask: Tensor

    def solve(self, problem: LayerProblem) -> Solution:
        weight = torch.where(self.mask, problem.weight, 0)
        return Solution(weight, self.mask, 0.0, 0.0, Status.OPTIMAL)


def test_wrong_mask_is_refused_and_claims_are_not_believed() -> None:
    layer = PROBLEMS["plain"]
    problem = layer.problem(NM(2, 4))
    mask = NM(2, 4).mask(layer.weight.abs())
    with pytest.raises(VerificationError, match="does not satisfy the pattern 2:4"):
        lw.solve(problem, Claims(~mask | mask))
    with pytest.raises(VerificationError, match=r"not satisfy the pattern 0\.5"):
        lw.solve(layer.problem(Unstructured(0.5, "row")), Claims(mask.roll(1, 0) & mask))
    graded = lw.solve(problem, Claims(mask))
    explicit = layer.explicit(torch.where(mask, layer.weight, 0))
    assert explicit > 0
    assert graded.objective == pytest.approx(explicit, rel=EXPLICIT[torch.float64])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
def test_weights_that_are_not_finite(value: float, pattern: Pattern) -> None:
    problem = PROBLEMS["plain"].problem(pattern)
    broken = Given(torch.full(problem.shape, value, dtype=torch.float64))
    with pytest.raises(SolveError, match="Given failed numerically; raise the damping"):
        lw.solve(problem, broken)
    returned = lw.solve(problem, broken, throw=False)
    assert returned.status is Status.NUMERICAL_ERROR
    chained = lw.solve(problem, lw.chain(broken, "least-squares"), throw=False)
    assert chained.status is Status.NUMERICAL_ERROR


# -- chains ----------------------------------------------------------------------------


def test_users_own_solver_in_a_chain() -> None:
    problem = PROBLEMS["drifted"].problem(NM(2, 4))
    steps = lw.chain(KeepEven(), "least-squares")
    assert steps.name == "KeepEven+least-squares"
    solution = lw.solve(problem, steps)
    assert solution.mask[:, ::2].all()
    mask = torch.zeros(problem.shape, dtype=torch.bool)
    mask[:, ::2] = True
    refit = lw.solve(problem.with_pattern(FixedMask(mask)), "least-squares")
    torch.testing.assert_close(solution.weight, refit.weight, rtol=0, atol=EQUIVARIANCE)


@dataclass(frozen=True)
class Recorder:
    """Records the calls of each step of a chain, then answers like magnitude pruning."""

    asked: list[tuple[Pattern, Start | None]]
    requires: frozenset[str] = frozenset({"gram"})
    name: str = "recorder"

    def can_solve(self, problem: LayerProblem) -> bool:
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        self.asked.append((problem.pattern, initial))
        return get_solver("magnitude").solve(problem)


def test_chain_hands_on_answers_and_masks() -> None:
    asked: list[tuple[Pattern, Start | None]] = []
    chooser = Recorder(asked)
    refitter = Recorder(asked, requires=frozenset({"gram", "mask"}))
    pattern = NM(2, 4)
    problem = PROBLEMS["drifted"].problem(pattern)
    wanda = lw.solve(problem, "wanda")
    lw.solve(problem, lw.chain("wanda", refitter, chooser))
    (refit_pattern, refit_start), (last_pattern, last_start) = asked
    assert isinstance(refit_pattern, FixedMask)
    assert torch.equal(refit_pattern.kept, wanda.mask)
    assert refit_start is not None
    assert torch.equal(refit_start.weight, wanda.weight)
    assert last_pattern is pattern
    assert last_start is not None
    assert last_start.mask is not None
    assert torch.equal(last_start.mask, wanda.mask)


def test_chain_equals_its_steps_by_hand() -> None:
    problem = PROBLEMS["drifted"].problem(Unstructured(0.5))
    chained = lw.solve(problem, "wanda+least-squares")
    mask = lw.solve(problem, "wanda").mask
    by_hand = lw.solve(problem.with_pattern(FixedMask(mask)), "least-squares")
    assert torch.equal(chained.mask, mask)
    torch.testing.assert_close(chained.weight, by_hand.weight, rtol=0, atol=EQUIVARIANCE)
    assert by_hand.status is Status.OPTIMAL
    assert chained.status is Status.FEASIBLE  # the mask is a heuristic's
    assert chained.certificate is not None
    posed_on_mask = lw.solve(
        problem.with_pattern(FixedMask(mask)), "magnitude+least-squares"
    )
    assert posed_on_mask.status is Status.OPTIMAL


def test_chain_starts_fista_from_the_answer_before() -> None:
    problem = PROBLEMS["correlated"].problem(Unstructured(0.7))
    sparsegpt = lw.solve(problem, "sparsegpt")
    chained = lw.solve(problem, "sparsegpt+fista")
    before, after = (
        float(objective_rows(problem, found.weight, damped=True).sum())
        for found in (sparsegpt, chained)
    )
    assert after <= before


# -- names -----------------------------------------------------------------------------


def test_unknown_names_are_answered_with_close_ones() -> None:
    problem, nothing = PROBLEMS["plain"].problem(Unstructured(0.5)), cast(Any, object())
    with pytest.raises(UsageError, match="unknown method 'fist': did you mean fista"):
        lw.solve(problem, "fist")
    with pytest.raises(UsageError, match=r"'sparse-gpt'.* did you mean sparsegpt"):
        lw.solve(problem, "wanda+sparse-gpt")
    with pytest.raises(UsageError, match=r"Known: .*wanda"):
        lw.solve(problem, "zzzz")
    with pytest.raises(UsageError, match="has no solve"):
        lw.solve(problem, nothing)
    with pytest.raises(UsageError, match="at least one solver"):
        lw.chain()


@pytest.mark.parametrize(
    ("steps", "at_fault"),
    [
        (("wanda", "columns"), "columns"),
        (("wanda", "least-squares", "dsnot", "fasp"), "fasp"),
        ((lw.chain("wanda", "flap"), "least-squares"), "flap"),
    ],
)
def test_chain_is_refused_before_its_first_step(steps: Any, at_fault: str) -> None:
    """Any step that cannot take what the others leave, also in a chain inside."""
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    asked: list[tuple[Pattern, Start | None]] = []
    watched = lw.chain(Recorder(asked), *steps)
    assert not watched.can_solve(problem)
    with pytest.raises(InvalidProblemError, match=f"^{at_fault} does not handle the patt"):
        lw.solve(problem, watched)
    assert asked == []
    assert lw.chain("columns", "least-squares").can_solve(problem.with_pattern(Columns(3)))


def test_pattern_that_a_solver_cannot_take() -> None:
    layer = PROBLEMS["plain"]
    with pytest.raises(InvalidProblemError, match=r'"wanda\+least-squares"'):
        lw.solve(layer.problem(Unstructured(0.5)), "least-squares")
    with pytest.raises(InvalidProblemError, match="sparsegpt does not handle"):
        lw.solve(layer.problem(Columns(8)), "sparsegpt")


@pytest.mark.parametrize("name", ["weight", "mask"])
def test_starts_of_another_shape(name: str) -> None:
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    start = lw.solve(problem, "wanda")
    wrong: Any = {name: getattr(start, name)[1:]}
    broken = replace(start, **wrong)
    with pytest.raises(InvalidProblemError, match=f"initial has a {name} of shape"):
        lw.solve(problem, "fista", initial=broken)


@pytest.mark.parametrize("method", ["fista", "swaps", "wanda+least-squares", "alps"])
def test_starts_that_need_gradients_leave_no_graph(method: str) -> None:
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    start = lw.solve(problem, "wanda")
    given = replace(start, weight=torch.nn.Parameter(start.weight))
    assert not lw.solve(problem, method, initial=given).weight.requires_grad

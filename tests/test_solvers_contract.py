"""What every solver of the registry owes, on every problem and pattern it can take.

A solver that is added to ``SOLVERS`` is tested here the moment it is there.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
from layerwise.solution import OnIteration, Solution, Solver, Status
from layerwise.solve import SCALED_FIGURES
from layerwise.solvers import SOLVERS, get_solver
from layerwise.solvers.least_squares import LeastSquares
from tests.problems import (
    DEAD_CHANNEL,
    PATTERNS,
    PROBLEMS,
    Layer,
    fits,
    layers,
    make_layer,
    patterns,
)
from tests.reference import Equations
from tests.tolerances import EQUIVARIANCE, EXPLICIT, MASK_DISAGREEMENT, ROUNDING


def _takes(solver: str, problem: str, pattern: str) -> bool:
    layer = PROBLEMS[problem]
    posed = PATTERNS[pattern](layer)
    return fits(posed, layer) and get_solver(solver).can_solve(layer.problem(posed))


CASES = [
    pytest.param(*case, id="-".join(case))
    for case in product(SOLVERS, PROBLEMS, PATTERNS)
    if _takes(*case)
]
REPEATED = [case for case in CASES if case.values[2] in ("layer-0.5", "2:4", "fixed")]
every_case = pytest.mark.parametrize(("solver", "problem", "pattern"), CASES)
repeated_case = pytest.mark.parametrize(("solver", "problem", "pattern"), REPEATED)
every_solver = pytest.mark.parametrize("solver", SOLVERS)

MULTI_WEIGHT = tuple(name for name in SOLVERS if name.startswith("multi-weight"))
# Weights of a row depend on that row alone; the others search a penalty for the layer
# (fista), follow its support (alps, best), or stop at a share of its objective (swaps).
ROW_BY_ROW = (
    *("magnitude", "wanda", "gblm", "dsnot", "frank-wolfe", "sparse-swaps"),
    *("sparsegpt", *MULTI_WEIGHT, "least-squares", "admm", "obs"),
)
# The order of the inputs is no part of the method; SparseGPT sweeps from left to right.
ANY_COLUMN_ORDER = (
    *("magnitude", "wanda", "ria", "gblm", "dsnot", "frank-wolfe", "sparse-swaps"),
    *("multi-weight-sm", "fista", "least-squares", "admm", "alps", "obs", "swaps", "best"),
)
ACTIVATION_AWARE = (
    *("wanda", "ria", "gblm", "dsnot", "sparsegpt", *MULTI_WEIGHT),
    *("fista", "alps", "obs", "swaps", "sparse-swaps", "best"),
)
# While rho is below the smallest eigenvalue, removed entries return in turn, and the steps
# may end in such a cycle.
CYCLING = ("alps",)
# Their scores compare more than sizes and norms: sums of the weights, means of the inputs.
OTHER_SCORES = ("ria", "dsnot")


@cache
def posed(problem: str, pattern: str) -> LayerProblem:
    layer = PROBLEMS[problem]
    return layer.problem(PATTERNS[pattern](layer))


@cache
def solved(solver: str, problem: str, pattern: str) -> Solution:
    return lw.solve(posed(problem, pattern), solver)


def for_solver(solver: str, layer: Layer, pattern: Pattern) -> LayerProblem:
    """Problem with the pattern, or with one of its masks if a solver takes only that."""
    problem = layer.problem(pattern)
    if get_solver(solver).can_solve(problem):
        return problem
    return problem.with_pattern(FixedMask(pattern.mask(problem.weight.double().abs())))


def bits(tensor: Tensor) -> Tensor:
    """Every bit of a tensor, so that -0.0 differs from 0.0."""
    return tensor.contiguous().view(torch.uint8)


def exact_floor(sparsity: float, size: int) -> int:
    return int(Fraction(str(sparsity)) * size // 1)


def assert_exact_count(pattern: Pattern, mask: Tensor) -> None:
    """Count zeros in a second way, not through ``Pattern.accepts``."""
    removed = (~mask).int()
    if isinstance(pattern, Unstructured) and pattern.group == "layer":
        assert int(removed.sum()) == exact_floor(pattern.sparsity, mask.numel())
    elif isinstance(pattern, Unstructured):
        expected = exact_floor(pattern.sparsity, mask.shape[1])
        assert removed.sum(dim=1).tolist() == [expected] * len(mask)
    elif isinstance(pattern, NM):
        groups = removed.reshape(len(mask), -1, pattern.m).sum(dim=2)
        assert torch.unique(groups).tolist() == [pattern.m - pattern.n]
    elif isinstance(pattern, Columns):
        assert removed.sum(dim=1).tolist() == [mask.shape[1] - pattern.keep] * len(mask)
        assert bool((mask == mask[0]).all())
    else:
        assert isinstance(pattern, FixedMask)
        assert torch.equal(mask, pattern.kept)


def test_cases_cover_registry_and_problems() -> None:
    for cases in (CASES, REPEATED):
        assert {case.values[0] for case in cases} == set(SOLVERS)
        assert {case.values[1] for case in cases} == set(PROBLEMS)
    assert {case.values[2] for case in CASES} == set(PATTERNS)
    names = {*ROW_BY_ROW, *ANY_COLUMN_ORDER, *ACTIVATION_AWARE}
    names |= {*OTHER_SCORES}
    assert names <= set(SOLVERS)


@every_solver
def test_is_a_solver(solver: str) -> None:
    chosen = get_solver(solver)
    assert isinstance(chosen, Solver)
    assert chosen.name == solver
    assert chosen.requires <= {"gram", "mean", "gradient", "mask"}


@every_case
def test_mask_is_feasible_and_counts_are_exact(
    solver: str, problem: str, pattern: str
) -> None:
    solution, layer = solved(solver, problem, pattern), PROBLEMS[problem]
    assert solution.mask.dtype == torch.bool
    assert solution.mask.shape == solution.weight.shape == layer.shape
    assert_exact_count(posed(problem, pattern).pattern, solution.mask)
    assert not bits(solution.weight[~solution.mask]).any()  # and no -0.0
    wide = layer.weight.dtype == torch.float64
    assert solution.weight.dtype == (torch.float64 if wide else torch.float32)
    assert solution.weight.device == solution.mask.device == layer.weight.device


@every_case
def test_reported_objective_is_the_definition(
    solver: str, problem: str, pattern: str
) -> None:
    solution, layer = solved(solver, problem, pattern), PROBLEMS[problem]
    explicit = layer.explicit(solution.weight)
    slack = EXPLICIT[posed(problem, pattern).dtype] * layer.energy
    assert solution.objective == pytest.approx(explicit, abs=slack, rel=0)
    squared = solution.relative_error**2 * layer.energy
    assert squared == pytest.approx(explicit, abs=slack, rel=0)


@every_case
def test_status_and_certificate_are_truthful(
    solver: str, problem: str, pattern: str
) -> None:
    solution, question = solved(solver, problem, pattern), posed(problem, pattern)
    certificate = solution.certificate
    fixed = isinstance(question.pattern, FixedMask)
    if solution.status is Status.OPTIMAL:
        assert certificate is not None
        assert fixed or certificate.kind == "support"
        assert certificate.bound <= LeastSquares().tolerance
    elif solution.status is Status.MAX_ITERATIONS:
        assert certificate is not None
        assert certificate.bound > LeastSquares().tolerance
    else:
        assert solution.status is Status.FEASIBLE
    if certificate is not None and certificate.kind == "refit":
        equations = Equations(PROBLEMS[problem], question.damping)
        value = equations.objective(solution.weight)
        best = float(equations.objective_rows(equations.least_squares(solution.mask)).sum())
        # summed over rows, the relative bound of the worst row bounds the whole
        slack = EXPLICIT[question.dtype] * PROBLEMS[problem].energy
        assert value - best <= certificate.bound * best + slack


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


@repeated_case
def test_no_better_than_a_refit_of_its_mask(
    solver: str, problem: str, pattern: str
) -> None:
    solution, question = solved(solver, problem, pattern), posed(problem, pattern)
    fixed = question.with_pattern(FixedMask(solution.mask))
    refit = lw.solve(fixed, "least-squares")
    value = float(objective_rows(question, solution.weight, damped=True).sum())
    best = float(objective_rows(question, refit.weight, damped=True).sum())
    assert refit.certificate is not None
    energy = float(question.energy.sum())
    assert best <= value * (1 + refit.certificate.bound) + ROUNDING * energy


@pytest.mark.parametrize(
    ("problem", "pattern"),
    [case.values[1:] for case in CASES if case.values[0] == "fista"],
)
def test_fista_improves_on_wanda(problem: str, pattern: str) -> None:
    question = posed(problem, pattern)
    of_fista, of_paper, of_wanda = (
        float(
            objective_rows(
                question, solved(name, problem, pattern).weight, damped=True
            ).sum()
        )
        for name in ("fista", "fista-paper", "wanda")
    )
    slack = LeastSquares().tolerance * of_wanda
    assert of_fista <= of_wanda + slack
    assert of_paper <= of_wanda + slack


# -- limits of the sparsity ------------------------------------------------------------


@every_solver
@pytest.mark.parametrize("problem", ["plain", "plain-float32", "dead-channel"])
@pytest.mark.parametrize("group", ["row", "layer"])
def test_sparsity_zero_returns_the_weight_bit_for_bit(
    solver: str, problem: str, group: Any
) -> None:
    layer = PROBLEMS[problem]
    solution = lw.solve(for_solver(solver, layer, Unstructured(0, group)), solver)
    assert torch.equal(bits(solution.weight), bits(layer.weight))
    assert solution.objective == 0
    assert solution.mask.all()


@every_solver
@pytest.mark.parametrize("group", ["row", "layer"])
@pytest.mark.parametrize("problem", ["plain", "drifted-float32", "few-tokens"])
def test_sparsity_near_one(solver: str, problem: str, group: Any) -> None:
    layer = PROBLEMS[problem]
    pattern = Unstructured(0.9999, group)
    solution = lw.solve(for_solver(solver, layer, pattern), solver)
    assert_exact_count(pattern, solution.mask)
    assert int(solution.mask.sum()) == (1 if group == "layer" else len(layer.weight))
    assert torch.isfinite(solution.weight).all()


@every_solver
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_weights_have_exact_counts(solver: str, value: float) -> None:
    layer = PROBLEMS["plain"]
    layer = replace(layer, weight=torch.full_like(layer.weight, value))
    for pattern in (Unstructured(0.7), Unstructured(0.7, "layer"), NM(2, 4)):
        solution = lw.solve(for_solver(solver, layer, pattern), solver)
        assert_exact_count(pattern, solution.mask)
        assert torch.isfinite(solution.weight).all()


@pytest.mark.parametrize("solver", ACTIVATION_AWARE)
def test_dead_channel_is_removed_first(solver: str) -> None:
    problem = PROBLEMS["dead-channel"].problem(Unstructured(0.5))
    assert not lw.solve(problem, solver).mask[:, DEAD_CHANNEL].any()


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_dead_channel_is_removed_first_however_large_its_weights(solver: str) -> None:
    layer = PROBLEMS["dead-channel"]
    weight = layer.weight.clone()
    weight[:, DEAD_CHANNEL] = 5
    problem = replace(layer, weight=weight).problem(Unstructured(0.1), damping=1e-6)
    assert not lw.solve(problem, solver).mask[:, DEAD_CHANNEL].any()


def _posable(solvers: Iterable[str], names: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs for `for_solver`, which finds a mask for a solver but no solver for a mask."""
    return [
        (solver, name)
        for solver, name in product(solvers, names)
        if name != "fixed" or _takes(solver, "drifted", name)
    ]


# -- invariance ------------------------------------------------------------------------


@pytest.mark.parametrize("problem", ["drifted", "drifted-float32"])
@pytest.mark.parametrize(
    ("solver", "pattern"), _posable(SOLVERS, ("row-0.5", "layer-0.7", "2:4", "fixed"))
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
    ("solver", "pattern"), _posable(ROW_BY_ROW, ("row-0.5", "2:4", "fixed"))
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


# -- other ways in ---------------------------------------------------------------------


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


@dataclass(frozen=True)
class Recorder:
    """Notes what each step of a chain is asked, then answers like magnitude pruning."""

    asked: list[tuple[Pattern, Solution | None]]
    requires: frozenset[str] = frozenset({"gram"})
    name: str = "recorder"

    def can_solve(self, problem: LayerProblem) -> bool:
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Solution | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Solution:
        self.asked.append((problem.pattern, initial))
        return get_solver("magnitude").solve(problem)


def test_chain_hands_on_answers_and_masks() -> None:
    asked: list[tuple[Pattern, Solution | None]] = []
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


def test_unknown_names_are_answered_with_close_ones() -> None:
    problem = PROBLEMS["plain"].problem(Unstructured(0.5))
    with pytest.raises(UsageError, match="unknown method 'fist': did you mean fista"):
        lw.solve(problem, "fist")
    with pytest.raises(UsageError, match=r"'sparse-gpt'.* did you mean sparsegpt"):
        lw.solve(problem, "wanda+sparse-gpt")
    with pytest.raises(UsageError, match=r"Known: .*wanda"):
        lw.solve(problem, "zzzz")
    with pytest.raises(UsageError, match="has no solve"):
        lw.solve(problem, object())
    with pytest.raises(UsageError, match="at least one solver"):
        lw.chain()


def test_pattern_that_a_solver_cannot_take() -> None:
    layer = PROBLEMS["plain"]
    with pytest.raises(InvalidProblemError, match=r'"wanda\+least-squares"'):
        lw.solve(layer.problem(Unstructured(0.5)), "least-squares")
    with pytest.raises(InvalidProblemError, match="sparsegpt does not handle"):
        lw.solve(layer.problem(Columns(8)), "sparsegpt")


# -- properties ------------------------------------------------------------------------


@given(data=st.data())
@every_solver
def test_every_answer_is_feasible(solver: str, data: st.DataObject) -> None:
    layer = data.draw(layers())
    pattern = data.draw(patterns(layer))
    if data.draw(st.booleans(), label="float32"):
        layer = layer.to(torch.float32)
    question = for_solver(solver, layer, pattern)
    solution = lw.solve(question, solver)
    assert_exact_count(pattern, solution.mask)
    assert not bits(solution.weight[~solution.mask]).any()
    assert torch.isfinite(solution.weight).all()
    explicit = layer.explicit(solution.weight)
    slack = EXPLICIT[question.dtype] * layer.magnitude(solution.weight)
    assert solution.objective == pytest.approx(explicit, abs=slack, rel=0)


@given(data=st.data())
@pytest.mark.parametrize(
    "solver", [name for name in SOLVERS if name not in (*CYCLING, *OTHER_SCORES)]
)
def test_identity_gram_is_magnitude_pruning(solver: str, data: st.DataObject) -> None:
    weight = data.draw(layers()).weight
    root = weight.shape[1] ** 0.5
    layer = Layer(weight, root * torch.eye(weight.shape[1], dtype=torch.float64))
    question = for_solver(solver, layer, data.draw(patterns(layer)))
    mask = question.pattern.mask(weight.abs())
    solution = lw.solve(question, solver)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(
        solution.weight, torch.where(mask, weight, 0), rtol=EQUIVARIANCE, atol=0
    )


@given(data=st.data())
@every_solver
def test_pruning_again_changes_nothing(solver: str, data: st.DataObject) -> None:
    layer = data.draw(layers(drift=False))
    question = for_solver(solver, layer, data.draw(patterns(layer)))
    once = lw.solve(question, solver)
    again = replace(layer, weight=once.weight).problem(question.pattern)
    twice = lw.solve(again, solver)
    assert torch.equal(twice.weight, once.weight)
    assert twice.objective == 0


@given(data=st.data())
def test_refit_beats_the_masked_weight(data: st.DataObject) -> None:
    layer = data.draw(layers())
    pattern = data.draw(patterns(layer))
    question = layer.problem(pattern)
    mask = lw.solve(question, "wanda").mask
    refit = lw.solve(question.with_pattern(FixedMask(mask)), "least-squares")
    masked = torch.where(mask, layer.weight, 0)
    value, before = (
        objective_rows(question, weight, damped=True) for weight in (refit.weight, masked)
    )
    assert bool((value <= before * (1 + LeastSquares().tolerance)).all())


@given(data=st.data())
def test_refit_error_grows_with_sparsity(data: st.DataObject) -> None:
    layer = data.draw(layers())
    question = layer.problem(Unstructured(0))
    scores = layer.weight.abs()
    values = []
    for percent in sorted(data.draw(st.lists(st.integers(0, 99), min_size=2, max_size=5))):
        mask = Unstructured(percent / 100).mask(scores)  # each inside the one before
        refit = lw.solve(question.with_pattern(FixedMask(mask)), "least-squares")
        values.append(objective_rows(question, refit.weight, damped=True))
    slack = ROUNDING * question.energy
    for less, more in pairwise(values):
        assert bool((less <= more * (1 + LeastSquares().tolerance) + slack).all())

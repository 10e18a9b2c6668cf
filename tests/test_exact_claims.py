"""No claim is false: certificates and bounds against optima in ball arithmetic.

Every layer is drawn from a seed (:mod:`tests.support.hard_layers`). What is claimed about
an answer is compared with an optimum in balls of 400 bits (:mod:`tests.support.balls`),
so that no rounding of the test can hide a false claim. The problem is the one of the stored
moments. Masks are enumerated; their minima are exact where a float64 screening finds them
promising, and every exact minimum is an upper bound of the optimum.

The short form draws 2,000 rows of each kind, and the solvers take turns. The layers marked
``exhaustive`` are 5,000 of each kind, with all solvers.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from flint import arb
from torch import Tensor

import layerwise as lw
from layerwise.certificates import ENERGY_FLOOR, l1_bounds, refit_excess
from layerwise.errors import LayerwiseError
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solver import SolverLike
from layerwise.solvers.lasso import LassoMethod, lasso
from layerwise.solvers.least_squares import LeastSquares
from tests.support.balls import ExactProblem, exactly, middle, screened
from tests.support.hard_layers import ORDINARY, HardLayer
from tests.support.tolerances import CLAIM

LAYERS = 20  # of a chunk
LARGE = 1e3  # of a weight: the energy of a row of larger ones may be rounding
MORE = 10_000  # first seed of the exhaustive form
ON_MASKS: list[SolverLike] = [
    "least-squares",
    LeastSquares(method="cg"),
    LeastSquares(method="direct", side="complement"),
    LeastSquares(method="cg", side="complement"),
    LeastSquares(method="cg", side="support", rank=2),
]
ON_ROWS: list[SolverLike] = [
    "alps",
    "obs",
    "swaps",
    "best",
    "fista",
    "multi-weight",
    "multi-weight-sm",
]
ON_COLUMNS: list[SolverLike] = ["fasp", "columns"]


def chunks(rows: int) -> pytest.MarkDecorator:
    """First seeds of all chunks: 2,000 rows, and 5,000 layers more if asked for."""
    short = 2000 // rows
    cases: list[object] = list(range(0, short, LAYERS))
    for first in range(MORE, MORE + 20_000 // rows, LAYERS):
        cases.append(pytest.param(first, marks=pytest.mark.exhaustive))
    return pytest.mark.parametrize("first", cases)


def layers(first: int, rows: int, widest: int = 8) -> Iterator[HardLayer]:
    for seed in range(first, first + LAYERS):
        yield HardLayer.of(seed, rows, widest)


def turns(solvers: list[SolverLike], seed: int, all_of_them: bool) -> list[SolverLike]:
    return solvers if all_of_them else [solvers[seed % len(solvers)]]


# --- refits ------------------------------------------------------------------------------


class Refits:
    """Claims about the weights on one layer, and how many were made."""

    def __init__(self) -> None:
        self.proven = self.silent = 0

    def check(self, problem: LayerProblem, solver: SolverLike) -> None:
        """Solve, and compare the certificate with the excess of the worst row."""
        try:
            found = lw.solve(problem, solver, throw=False)
        except LayerwiseError:
            return
        claim = found.certificate
        if found.status is Status.NUMERICAL_ERROR or claim is None:
            return
        used = problem if found.bias is None else problem.centered()
        used = used.with_damping(found.stats["damping"])
        bounds = torch.full((problem.shape[0],), claim.bound)
        excess = self.compare(used, found.weight, found.mask, bounds)
        if found.status is Status.OPTIMAL:
            assert excess <= LeastSquares.tolerance

    def compare(
        self, problem: LayerProblem, weight: Tensor, mask: Tensor, claims: Tensor
    ) -> float:
        """Largest relative excess; no row has more than its claim."""
        exact, worst = ExactProblem(problem), 0.0
        for row, claim in enumerate(claims.tolist()):
            size = float(problem.weight[row].abs().max())
            if problem.damping >= ORDINARY and size < LARGE:
                self.proven += claim < math.inf
                self.silent += claim == math.inf
            least = exact.least(row, mask[row].nonzero()[:, 0].tolist())
            if least is None:
                continue
            excess = exact.value(row, exactly(weight[row])) - least
            floor = arb(ENERGY_FLOOR) * arb(float(problem.energy[row]))
            unit = least if bool(least > floor) else floor
            assert not excess > unit * arb(claim) * (1 + arb(CLAIM))
            if bool(unit > 0):
                worst = max(worst, middle(excess / unit))
        return worst


def perturbed(problem: LayerProblem, weight: Tensor, mask: Tensor) -> Iterator[Tensor]:
    """Weights moved along the flattest direction of their support, by 1e-16 to 1."""
    gram = problem.damped_gram(torch.float64)
    both = mask[:, :, None] & mask[:, None, :]
    outside = float(gram.diagonal().max()) * torch.eye(len(gram), dtype=torch.float64)
    flattest = torch.linalg.eigh(torch.where(both, gram, outside))[1][:, :, 0]
    step = torch.where(mask, flattest, 0) * weight.abs().amax(dim=1, keepdim=True)
    for size in (1e-16, 1e-12, 1e-8, 1e-4, 1.0):
        yield weight + size * step


@chunks(rows=4)
def test_refits(first: int) -> None:
    refits, everything = Refits(), first >= MORE
    for seed, layer in enumerate(layers(first, rows=4), first):
        rows = Unstructured(layer.choose.choice([0.3, 0.5, 0.7]))
        cases: list[tuple[Pattern, list[SolverLike]]] = [
            (FixedMask(layer.kept), ON_MASKS),
            (rows, ON_ROWS),
            (Columns(layer.weight.shape[1] // 2), ON_COLUMNS),
        ]
        if not everything:
            cases = [cases[0], cases[1 + seed % 2]]
        for pattern, solvers in cases:
            problem = layer.problem(pattern)
            for solver in turns(solvers, seed // 2, everything):
                refits.check(problem, solver)
        problem = layer.problem(FixedMask(layer.kept))
        problem = problem.with_damping(problem.factor(torch.float64).damping)
        best = lw.solve(problem, "least-squares").weight.double()
        wrong = list(perturbed(problem, best, layer.kept))
        for weight in wrong if everything else [wrong[seed % len(wrong)]]:
            claims = refit_excess(problem, weight, layer.kept)
            refits.compare(problem, weight, layer.kept, claims)
    assert refits.silent <= 0.1 * refits.proven


# --- l1 ----------------------------------------------------------------------------------


def supports(
    problem: LayerProblem, row: int, penalty: float, start: Tensor
) -> Iterator[dict[int, float]]:
    """Supports with signs, from those of the start, by steps of an active set method."""
    gram = problem.damped_gram(torch.float64)
    target = problem.weight[row].double() @ gram
    if problem.shift is not None:
        target = target + problem.shift[row]
    signs = {int(j): float(start[j].sign()) for j in start.nonzero()[:, 0]}
    for _ in range(2 * len(gram)):
        yield signs
        weight, kept = torch.zeros_like(target), list(signs)
        if kept:
            pull = penalty / 2 * torch.tensor(list(signs.values()), dtype=torch.float64)
            inverse = torch.linalg.inv_ex(gram[kept][:, kept])[0]
            weight[kept] = inverse @ (target[kept] - pull)
        wrong = [j for j in kept if not float(weight[j]) * signs[j] > 0]
        if wrong:
            signs = {j: sign for j, sign in signs.items() if j not in wrong}
            continue
        slope = target - weight @ gram
        slope[kept] = 0
        entering = int(slope.abs().argmax())
        if not float(slope[entering].abs()) > penalty / 2:
            return
        signs = signs | {entering: float(slope[entering].sign())}


def least_l1(
    problem: LayerProblem, exact: ExactProblem, row: int, penalty: float, start: Tensor
) -> arb:
    """Smallest exact value of the l1 problem that was found for a row."""
    visited = list(supports(problem, row, penalty, start))
    best = value_l1(exact, row, penalty, exactly(start))
    for signs in (visited[0], visited[-1]):
        pull = [penalty / 2 * sign for sign in signs.values()]
        weights = exact.best(row, list(signs), pull)
        if weights is not None:
            value = value_l1(exact, row, penalty, weights)
            best = value if bool(value < best) else best
    return best


def value_l1(exact: ExactProblem, row: int, penalty: float, weights: list[arb]) -> arb:
    norm = sum((abs(weight) for weight in weights), arb(0))
    return exact.value(row, weights) + arb(penalty) * norm


@chunks(rows=4)
def test_l1_gaps(first: int) -> None:
    proven = solved = 0
    for layer in layers(first, rows=4):
        choose, problem = layer.choose, layer.problem(Unstructured(0.5))
        largest = float(problem.damped()[1].abs().max())
        penalty = largest * 10 ** choose.uniform(-5, 0.2)
        tolerance = choose.choice([1e-2, 1e-4, 1e-8, 1e-12, 0.0])
        methods: tuple[LassoMethod, ...] = ("fista",)
        if tolerance:
            methods = ("auto", "splitting", "fista")
        result = lasso(
            problem,
            penalty,
            tolerance=tolerance,
            max_iterations=choose.choice([3, 50, 300]),
            method=choose.choice(methods),
        )
        used = problem.with_damping(problem.normalized()[0].factorized()[0].damping)
        bounds = l1_bounds(used, result.weight, penalty)
        exact, total, primal = ExactProblem(used), arb(0), arb(0)
        for row, claim in enumerate(bounds.excess.tolist()):
            start = result.weight[row]
            value = value_l1(exact, row, penalty, exactly(start))
            excess = value - least_l1(used, exact, row, penalty, start)
            assert not excess > arb(claim) * (1 + arb(CLAIM))
            total, primal = total + excess, primal + value
        assert not abs(primal - arb(result.primal)) > arb(result.rounding)
        if result.gap < math.inf:
            assert primal > 0
            assert not total > arb(result.gap) * primal
        solved += used.damping >= ORDINARY
        proven += used.damping >= ORDINARY and result.gap < math.inf
    assert proven >= 0.9 * solved


# --- lower bounds ------------------------------------------------------------------------


def every_mask(width: int) -> Tensor:
    return torch.tensor(list(itertools.product([False, True], repeat=width)))


def masks_of(pattern: Pattern, width: int) -> Tensor:
    """All masks of a row, (masks, in)."""
    every = every_mask(width)
    if isinstance(pattern, NM):
        groups = every.reshape(len(every), -1, pattern.m).sum(dim=2)
        return every[(groups == pattern.n).all(dim=1)]
    assert isinstance(pattern, Unstructured)
    return every[every.sum(dim=1) == width - pattern.removed(width)]


def best_of_rows(problem: LayerProblem, exact: ExactProblem) -> list[arb | None]:
    """Smallest exact objective that was found for every row."""
    pattern, rows = problem.pattern, range(problem.shape[0])
    if isinstance(pattern, FixedMask):
        return [exact.least(i, pattern.kept[i].nonzero()[:, 0].tolist()) for i in rows]
    masks = masks_of(pattern, problem.shape[1])
    values = screened(problem, masks)
    return [best_of(exact, row, masks, values[row]) for row in rows]


def best_of(exact: ExactProblem, row: int, masks: Tensor, values: Tensor) -> arb | None:
    """Smallest exact minimum on the two masks with the smallest values."""
    promising = masks[values.argsort()[:2]]
    found = [exact.least(row, mask.nonzero()[:, 0].tolist()) for mask in promising]
    return min((value for value in found if value is not None), key=middle, default=None)


def best_of_layer(problem: LayerProblem, exact: ExactProblem) -> list[arb | None]:
    """The same for one budget: the best counts of two rows."""
    (rows, width), pattern = problem.shape, problem.pattern
    assert rows == 2
    assert isinstance(pattern, Unstructured)
    kept = rows * width - pattern.removed(rows * width)
    masks, sums = every_mask(width), []
    values, counts = screened(problem, masks), masks.sum(dim=1)
    for count in range(max(0, kept - width), min(width, kept) + 1):
        first, second = counts == count, counts == kept - count
        one = best_of(exact, 0, masks[first], values[0, first])
        other = best_of(exact, 1, masks[second], values[1, second])
        if one is not None and other is not None:
            sums.append(one + other)
    return [min(sums, key=middle, default=None)]


def posed(layer: HardLayer, kind: str) -> tuple[LayerProblem, SolverLike]:
    choose, width = layer.choose, layer.weight.shape[1]
    if kind == "mask":
        return layer.problem(FixedMask(layer.kept)), "least-squares"
    pattern: Pattern = Unstructured(choose.choice([0.2, 0.4, 0.5, 0.7, 0.9]))
    if kind == "layer":
        layer = layer.cut(2, 5)
        pattern = Unstructured(choose.choice([0.3, 0.5, 0.7]), "layer")
    elif kind == "n:m":
        size = 4 if width >= 4 else 2
        layer = layer.cut(len(layer.weight), width - width % size)
        pattern = NM(choose.randint(1, size), size)
    return layer.problem(pattern), choose.choice(["wanda", "alps", "best"])


def check_gap(problem: LayerProblem, found: Solution, optimum: list[arb | None]) -> None:
    """No answer saves a larger share of the objective than the proven gap."""
    gap = lw.proven_gap(problem, found).bound
    assert 0 <= gap <= 1
    exact = ExactProblem(problem)
    value, least = arb(0), arb(0)
    for row in range(problem.shape[0]):
        value += exact.value(row, exactly(found.weight[row]))
    for best in optimum:
        if best is None:
            return
        least += best
    if gap < 1 and bool(value > 0):
        assert not value - least > arb(gap) * value


@pytest.mark.parametrize("kind", ["row", "n:m", "layer", "mask"])
@chunks(rows=16)
def test_lower_bounds(first: int, kind: str) -> None:
    positive = solved = 0
    for layer in layers(first, rows=4):
        problem, solver = posed(layer, kind)
        found = lw.solve(problem, solver, throw=False)
        start = found.weight if layer.choose.random() < 0.7 else None
        bounds = lw.lower_bounds(problem, start)
        best: Callable[..., list[arb | None]] = (
            best_of_layer if kind == "layer" else best_of_rows
        )
        optimum = best(problem, ExactProblem(problem))
        for bound, least in zip(bounds.tolist(), optimum, strict=True):
            if least is not None and bound > 0:
                assert not arb(bound) > least
            if problem.damping >= ORDINARY and least is not None:
                solved += bool(least > 0)
                positive += bound > 0
        used = problem.with_damping(found.stats.get("damping", problem.damping))
        if used.damping != problem.damping:
            optimum = best(used, ExactProblem(used))
        check_gap(used, found, optimum)
    assert positive >= 0.2 * solved

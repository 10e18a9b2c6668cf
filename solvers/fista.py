r"""FISTA with an l1 penalty that adapts to the pattern, and an exact refit.

For one penalty, the convex problem ``objective(What) + penalty * sum|What|`` is solved
by accelerated proximal gradient steps in a diagonal metric d,

.. math:: U_{k+1} = S_{p / (2 L d)} \big(Y_k + R(Y_k) / (L d)\big),  \quad R(Y) = T - Y G,

with a momentum per row that restarts where it points uphill, until the duality gap of
every row is small. Rows are independent and leave the iteration when they are done.
Residuals are linear, so ``R(Y_k)`` costs nothing and an iteration is one product.

The penalty is then searched on a log scale [1]_: round U to the pattern; if the rounding
error is more than `ratio` of the total error the penalty is too small, else too large.
The best mask is refitted exactly.

References
----------
.. [1] P. Zhao et al., "FISTAPruner: Layer-wise Post-training Pruning for Large Language
   Models", EMNLP 2025, arXiv:2408.03728, algorithm 1.
.. [2] A. Beck, M. Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear
   Inverse Problems", SIAM J. Imaging Sciences 2009.
.. [3] B. O'Donoghue, E. Candes, "Adaptive Restart for Accelerated Gradient Schemes",
   Foundations of Computational Mathematics 2015, section 3.2 (gradient restart).

Notes
-----
Deviations of ``fista`` from [1]_, all undone by ``fista-paper``: (1) stop on the duality
gap instead of after 20 iterations; (2) diagonal metric where it conditions better;
(3) restarts; (4) rounds are compared after a few conjugate gradient steps on their mask,
and the best mask is refitted; (5) the search starts at the penalty that a diagonal gram
would need, and each penalty at the solution of the one before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.certificates import l1_bounds, l1_dual, least_squares_minimum
from layerwise.errors import InvalidProblemError
from layerwise.evaluate import evaluate, objective_rows
from layerwise.linalg import largest_eigenvalue, smallest_eigenvalue
from layerwise.patterns import FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import OnIteration, Solution, Status
from layerwise.solvers.least_squares import LeastSquares, masked_cg
from layerwise.solvers.wanda import Wanda

Metric = Literal["auto", "gram", "diagonal"]

GAP_EVERY = 5  # iterations between two evaluations of the gap
STEP_MARGIN = 1.02  # power iteration sees the largest eigenvalue from below
STEP_GROWTH = 1.5  # where a step turns out too long after all
PENALTY_FACTOR = 4.0  # of the search, until it has a bracket
BRACKET = 1.05  # ratio of upper to lower penalty at which the search ends


@dataclass(frozen=True, eq=False)
class LassoResult:
    """Solution of the convex l1 problem and its certificate.

    Parameters
    ----------
    weight
        Shape (out, in): the iterate after the soft threshold, exactly sparse.
    primal
        ``damped objective + penalty * sum|weight|``, float64.
    gap
        ``(primal - dual) / primal``: proven bound on the relative suboptimality.
    iterations
        Products with the gram.
    status
        ``OPTIMAL`` if the gap is below the tolerance, else ``MAX_ITERATIONS``.
    """

    weight: Tensor
    primal: float
    gap: float
    iterations: int
    status: Status


def lasso(
    problem: LayerProblem,
    penalty: float,
    *,
    initial: Tensor | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 2000,
    metric: Metric = "auto",
    restart: bool = True,
) -> LassoResult:
    r"""Solve the convex problem alone: damped objective plus an l1 penalty.

    .. math:: \min_{\hat W} f(\hat W) + \text{penalty} \sum_{ij} |\hat W_{ij}|

    with f the damped objective, not halved: from ``penalty = 2 max|T|`` on the solution
    is zero. The pattern of the problem is ignored.

    Parameters
    ----------
    problem
        The layer.
    penalty
        Weight of the l1 norm, >= 0.
    initial
        Start, shape (out, in); the dense weight by default.
    tolerance
        Relative duality gap of every row; 0 runs all iterations.
    max_iterations
        Products with the gram.
    metric
        ``"gram"`` (one step length), ``"diagonal"`` (scaled by diag(gram)), or the one
        with the smaller condition number.
    restart
        Whether a row's momentum restarts where it points uphill.
    """
    if penalty < 0:
        message = f"penalty must not be negative, got {penalty}"
        raise InvalidProblemError(message)
    scaled, exponent = problem.normalized()
    quadratic = Quadratic(scaled.factorized()[0], metric)
    start = problem.weight if initial is None else initial
    unit_penalty = penalty * 2.0**-exponent
    weight, iterations = quadratic.minimize(
        unit_penalty, start, tolerance, max_iterations, restart=restart
    )
    bounds = l1_bounds(quadratic.problem, weight, unit_penalty)
    primal, dual = (float(rows.sum()) for rows in bounds)
    gap = (primal - dual) / primal if primal > 0 else 0.0
    status = Status.OPTIMAL if gap <= tolerance else Status.MAX_ITERATIONS
    return LassoResult(weight, primal * 2.0**exponent, gap, iterations, status)


@dataclass(frozen=True)
class Fista:
    """l1 problems along a penalty search, rounded to the pattern and refitted exactly.

    Cost: one (out, in, in) product per iteration, some hundred iterations in all.

    Parameters
    ----------
    ratio
        Share of the rounding error in the total error above which the penalty grows (xi).
    patience
        Rounds without improvement after which the search stops (T).
    max_rounds
        Most penalties tried.
    tolerance
        Relative duality gap of each l1 problem; 0 runs `max_iterations` steps.
    max_iterations
        Steps per penalty (K).
    metric
        See :func:`lasso`.
    restart
        Whether a row's momentum restarts where it points uphill.
    polish
        Conjugate gradient steps on a round's mask before it is compared; 0 compares the
        rounded weights themselves.
    refit
        Whether the best mask is refitted exactly at the end.
    from_best
        Whether a round starts at the best rounded weights so far, as published, instead
        of at the solution of the previous penalty.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    name: str = "fista"
    ratio: float = 0.3
    patience: int = 3
    max_rounds: int = 16
    tolerance: float = 1e-3
    max_iterations: int = 500
    metric: Metric = "auto"
    restart: bool = True
    polish: int = 8
    refit: bool = True
    from_best: bool = False

    def can_solve(self, problem: LayerProblem) -> bool:
        """Every pattern; a mask that is fixed is only refitted."""
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Solution | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Solution:
        """Search the penalty from `initial`, by default from Wanda's mask."""
        damping = problem.factorized()[1].damping
        problem = problem.with_damping(damping)
        begin = initial or Wanda().solve(problem)
        mask = problem.pattern.mask(begin.weight.abs() + begin.mask)
        quadratic = Quadratic(problem, self.metric)
        best = self._round_off(quadratic, begin.weight, mask)
        history: list[Mapping[str, float]] = []
        steps, failures = 0, 0
        if isinstance(problem.pattern, FixedMask):
            return self._finish(problem, best, steps, history)
        search = PenaltySearch(_first_penalty(problem))
        current = best.weight if self.from_best else quadratic.dense
        for _ in range(self.max_rounds):
            current, iterations = quadratic.minimize(
                search.penalty,
                best.weight if self.from_best else current,
                self.tolerance,
                self.max_iterations,
                restart=self.restart,
            )
            steps += iterations
            mask = problem.pattern.mask(current.abs())
            found = self._round_off(quadratic, current, mask)
            rounding = _rounding_error(quadratic, current, mask)
            share = rounding / max(found.rounded, 1e-300)
            history.append(
                {
                    "penalty": search.penalty,
                    "iterations": iterations,
                    "sparsity": float((current == 0).double().mean()),
                    "rounding_share": share,
                    "objective": found.objective,
                }
            )
            if on_iteration is not None:
                on_iteration(history[-1])
            failures = 0 if found.objective < best.objective else failures + 1
            best = min(best, found, key=lambda entry: entry.objective)
            search.update(too_small=share > self.ratio)
            if failures >= self.patience or search.finished:
                break
        return self._finish(problem, best, steps, history)

    def _round_off(
        self, quadratic: "Quadratic", weight: Tensor, mask: Tensor
    ) -> "_Candidate":
        """Round to the mask, polish, and measure."""
        problem = quadratic.problem
        rounded = torch.where(mask, weight.to(quadratic.dense.dtype), 0)
        total = float(objective_rows(problem, rounded, damped=True).sum()) ** 0.5
        if not self.polish:
            return _Candidate(rounded, mask, total**2, total)
        sides = torch.where(mask, quadratic.residual(rounded), 0)
        step, _ = masked_cg(quadratic.gram, mask, sides, 0.0, self.polish)
        polished = rounded + step
        objective = float(objective_rows(problem, polished, damped=True).sum())
        return _Candidate(polished, mask, objective, total)

    def _finish(
        self,
        problem: LayerProblem,
        best: "_Candidate",
        steps: int,
        history: list[Mapping[str, float]],
    ) -> Solution:
        solution = evaluate(problem, best.weight, best.mask, Status.FEASIBLE)
        certificate, stats = None, {"damping": problem.damping}
        if self.refit:
            posed = problem.with_pattern(FixedMask(best.mask))
            solution = LeastSquares().solve(posed, initial=solution)
            certificate, stats = solution.certificate, dict(solution.stats)
        fixed = isinstance(problem.pattern, FixedMask)
        return evaluate(
            problem,
            solution.weight,
            best.mask,
            solution.status if fixed else Status.FEASIBLE,
            certificate=certificate,
            iterations=steps,
            history=tuple(history),
            stats=stats,
        )


def fista_paper() -> Fista:
    """FISTAPruner's own setting: K=20 plain steps a round, xi=0.3, T=3, no refit."""
    return Fista(
        name="fista-paper",
        max_rounds=30,
        tolerance=0,
        max_iterations=20,
        metric="gram",
        restart=False,
        polish=0,
        refit=False,
        from_best=True,
    )


class PenaltySearch:
    """Bracket, then bisect, the penalty on a log scale."""

    def __init__(self, first: float) -> None:
        self.penalty = first
        self._lower, self._upper = 0.0, float("inf")

    @property
    def finished(self) -> bool:
        """Whether the bracket is too narrow to tell masks apart."""
        return self._upper < BRACKET * self._lower

    def update(self, *, too_small: bool) -> None:
        """Move to the next penalty."""
        if too_small:
            self._lower = self.penalty
        else:
            self._upper = self.penalty
        if self._upper == float("inf"):
            self.penalty *= PENALTY_FACTOR
        elif self._lower == 0:
            self.penalty /= PENALTY_FACTOR
        else:
            self.penalty = (self._lower * self._upper) ** 0.5


@dataclass(frozen=True, eq=False)
class _Candidate:
    weight: Tensor
    mask: Tensor
    objective: float  # damped, after polishing
    rounded: float  # square root of the damped objective before polishing


def _first_penalty(problem: LayerProblem) -> float:
    """Penalty at which a diagonal gram would give the sparsity of the pattern."""
    scores = 2 * problem.gram.diagonal() * problem.weight.double().abs()
    removed = ~problem.pattern.mask(scores.to(problem.dtype))
    if not bool(removed.any()):
        return float(scores.max()) * 1e-6
    return max(float(scores[removed].mean()), float(scores.max()) * 1e-6)


def _rounding_error(quadratic: "Quadratic", weight: Tensor, mask: Tensor) -> float:
    """``||(U_R - U) Xhat||_F`` of the entries that rounding removed, damped."""
    lost = torch.where(mask, 0, weight)
    return float(((lost @ quadratic.gram) * lost).sum().clamp(min=0)) ** 0.5


class Quadratic:
    """The smooth part of the l1 problem, prepared once for many penalties."""

    def __init__(self, problem: LayerProblem, metric: Metric) -> None:
        self.problem = problem
        self.gram, self.target = problem.damped()
        self.dense = problem.weight.to(problem.dtype)
        shift = problem.shift
        self.shift = torch.zeros_like(self.dense) if shift is None else shift.to(problem.dtype)
        minimum = least_squares_minimum(problem)
        self.minimum = minimum.to(problem.dtype)
        self.excess_of_dense = (problem.drift - minimum).to(problem.dtype)
        self.scale, self.lipschitz = self._metric(metric)

    def _metric(self, metric: Metric) -> tuple[Tensor, float]:
        """Diagonal d and step bound L with ``gram <= L diag(d)``."""
        diagonal = self.gram.diagonal().clone()
        choices = {"gram": torch.ones_like(diagonal) * diagonal.mean(), "diagonal": diagonal}
        if metric != "auto":
            choices = {metric: choices[metric]}
        factor = self.problem.factor()
        best = (torch.ones_like(diagonal), float("inf"), float("inf"))
        for scale in choices.values():
            root = scale.sqrt()
            largest = largest_eigenvalue(self.gram / root / root[:, None])
            condition = largest / smallest_eigenvalue(factor, 1 / root)
            if condition < best[2]:
                best = (scale, largest, condition)
        return best[0], best[1] * STEP_MARGIN

    def residual(self, weight: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """``T - weight G`` for some rows, written around the dense weight."""
        return torch.addmm(self.shift[rows], self.dense[rows] - weight, self.gram)

    def minimize(
        self,
        penalty: float,
        start: Tensor,
        tolerance: float,
        max_iterations: int,
        *,
        restart: bool = True,
    ) -> tuple[Tensor, int]:
        """FISTA from `start`; returns the thresholded iterate and the iterations."""
        result = start.to(self.dense.dtype).clone()
        rows = torch.arange(len(result), device=result.device)
        iterate, rest = result.clone(), self.residual(result)
        last, last_rest = iterate, rest
        momentum = torch.ones(len(rows), 1, dtype=result.dtype, device=result.device)
        ahead = torch.zeros_like(momentum)
        iteration = 0
        for iteration in range(1, max_iterations + 1):
            point = iterate + ahead * (iterate - last)
            point_rest = rest + ahead * (rest - last_rest)
            last, last_rest = iterate, rest
            iterate, rest = self._step(point, point_rest, penalty, rows)
            grown = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
            ahead, momentum = (momentum - 1) / grown, grown
            if restart:
                uphill = ((point - iterate) * self.scale * (iterate - last)).sum(dim=1) > 0
                ahead[uphill], momentum[uphill] = 0, 1
            if tolerance > 0 and (iteration % GAP_EVERY == 0 or iteration == 1):
                done = self._gap(iterate, rest, penalty, rows) <= tolerance
                if bool(done.any()):
                    result[rows[done]] = iterate[done]
                    more = ~done
                    rows, iterate, rest, last, last_rest, momentum, ahead = (
                        tensor[more]
                        for tensor in (rows, iterate, rest, last, last_rest, momentum, ahead)
                    )
                    if len(rows) == 0:
                        break
        result[rows] = iterate
        return result, iteration

    def _step(
        self, point: Tensor, point_rest: Tensor, penalty: float, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Proximal gradient step, shortened until the quadratic model majorises."""
        while True:
            length = self.lipschitz * self.scale
            moved = point + point_rest / length
            trial = moved.sign() * (moved.abs() - penalty / (2 * length)).clamp_(min=0)
            rest = self.residual(trial, rows)
            change = trial - point
            curvature = (change * (point_rest - rest)).sum()
            model = (change.square() * length).sum()
            if bool(curvature <= model * (1 + 1e-5)):
                return trial, rest
            self.lipschitz *= STEP_GROWTH

    def _gap(self, weight: Tensor, rest: Tensor, penalty: float, rows: Tensor) -> Tensor:
        """Relative duality gap of some rows, in the working precision."""
        change = self.dense[rows] - weight
        excess = (change * (rest + self.shift[rows])).sum(dim=1) + self.excess_of_dense[rows]
        above = excess + penalty * weight.abs().sum(dim=1)
        inner = (weight * rest).sum(dim=1)
        dual = l1_dual(excess.clamp(min=0), inner, rest.abs().amax(dim=1), penalty)
        primal = (above + self.minimum[rows]).clamp(min=torch.finfo(above.dtype).tiny)
        return (above - dual) / primal

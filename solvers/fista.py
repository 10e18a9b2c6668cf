r"""FISTA with an l1 penalty that adapts to the pattern, and an exact refit.

For a given penalty, the convex problem ``objective(What) + penalty * sum|What|`` is solved
to a duality gap (:func:`layerwise.solvers.lasso.lasso`). The penalty is searched on a log
scale [1]_. A round solves the problem and rounds the solution U to the pattern. If the
rounding error is more than `ratio` of the total error, the penalty is too small, else too
large. The best mask is refitted exactly.

References
----------
.. [1] P. Zhao et al., "FISTAPruner: Layer-wise Post-training Pruning for Large Language
   Models", EMNLP 2025, arXiv:2408.03728, algorithm 1.

Notes
-----
Deviations of ``fista`` from [1]_, all undone by ``fista-paper``: (1) l1 problems stop on
the duality gap instead of after 20 iterations, and are solved by alternating directions,
which need fewer iterations, before FISTA; (2) the mask is chosen by saliency; (3) rounds
are compared after a few conjugate gradient steps on their mask, and the best mask is
refitted; (4) each penalty starts at the solution of the previous one. In both solvers, the
search starts at the penalty that a diagonal gram would need instead of at 1e-5.

The published warm start is the answer of SparseGPT for OPT and of Wanda for LLaMA. A layer
problem does not know its model, so ``fista-paper`` leaves `warm_start` unset. Then it is
Wanda here, and :func:`layerwise.prune_model` sets the published one for the model.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.evaluate import (
    objective_from_residual,
    objective_rows,
    residual,
)
from layerwise.patterns import NM, FixedMask, Pattern
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start, mask_of
from layerwise.solver import OnIteration, Solver
from layerwise.solvers.lasso import (
    L1Path,
    LassoMethod,
    LassoResult,
    Metric,
    Quadratic,
    lasso,
)
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.magnitude import Magnitude
from layerwise.solvers.refit.polish import polish
from layerwise.solvers.sparsegpt import SparseGPT
from layerwise.solvers.wanda import Wanda

__all__ = ["Fista", "LassoResult", "fista_paper", "lasso"]

WARM_STARTS: Mapping[str, Callable[[], Solver]] = MappingProxyType(
    {"wanda": Wanda, "sparsegpt": SparseGPT, "magnitude": Magnitude}
)
RATIO, RATIO_NM = 0.5, 0.8  # shares of the rounding error that gave the best masks
PENALTY_FACTOR = 2.0  # between two penalties until the search has a bracket
BRACKET = 1.05  # ratio of upper to lower penalty at which the search ends


@dataclass(frozen=True)
class Fista:
    """Solve l1 problems along a penalty search, round to the pattern, refit exactly.

    Cost: one (out, in, in) product per iteration, some tens of iterations in all.

    Parameters
    ----------
    ratio
        Share of the rounding error in the total error above which the penalty grows (xi).
        The defaults, 0.5, and 0.8 for n:m, gave about the least refitted errors.
    rounding
        Score of the entries that rounding keeps: ``"magnitude"``, or ``"saliency"``, the
        exact cost ``u^2 / [G^-1]_jj`` of removing an entry alone.
    patience
        Rounds without improvement after which the search stops (T).
    max_rounds
        Largest number of penalties.
    tolerance
        Relative duality gap of every row of an l1 problem; 0 runs `max_iterations` steps.
        Up to a tolerance of 0.03, refitted errors are within 0.2 % of those at 1e-4.
    max_iterations
        Largest number of steps per penalty (K).
    method, metric, restart
        See :func:`lasso`.
    polish
        Conjugate gradient steps on a round's mask before it is compared; 0 compares the
        rounded weights themselves.
    refit
        Whether the best mask is refitted exactly at the end.
    from_best
        Whether a round starts at the best rounded weights so far, as published, instead
        of at the solution of the previous penalty.
    warm_start
        Solver whose answer the search starts from if no `initial` is given: one of
        ``"wanda"``, ``"sparsegpt"`` and ``"magnitude"``. None is Wanda, but a run replaces
        it by the start of the paper for its model (``fista-paper`` only).
    memory_budget
        Bytes for the row systems of the refit.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    name: str = "fista"
    ratio: float | None = None
    rounding: Literal["saliency", "magnitude"] = "saliency"
    patience: int = 3
    max_rounds: int = 16
    tolerance: float = 1e-3
    max_iterations: int = 500
    method: LassoMethod = "auto"
    metric: Metric = "auto"
    restart: bool = True
    polish: int = 8
    refit: bool = True
    from_best: bool = False
    warm_start: Literal["wanda", "sparsegpt", "magnitude"] | None = "wanda"
    memory_budget: int = LeastSquares.memory_budget

    @property
    def guarantee(self) -> str:
        """Guarantee of the answer, in words."""
        return "certified refit" if self.refit else "none"

    def _ratio(self, pattern: Pattern) -> float:
        if self.ratio is not None:
            return self.ratio
        return RATIO_NM if isinstance(pattern, NM) else RATIO

    def _scores(self, quadratic: Quadratic, weight: Tensor) -> Tensor:
        if self.rounding == "magnitude":
            return weight.abs()
        return weight.abs() * quadratic.saliency

    def can_solve(self, problem: LayerProblem) -> bool:
        """The patterns of the warm start; a fixed mask is only refitted."""
        return self._start().can_solve(problem)

    def _start(self) -> Solver:
        return WARM_STARTS[self.warm_start or "wanda"]()

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Search the penalty from `initial`, by default from the warm start."""
        damping = problem.factorized()[1].damping
        problem = problem.with_damping(damping)
        begin = initial or self._start().solve(problem)
        start = mask_of(begin, problem.pattern)
        mask = problem.pattern.mask(begin.weight.abs() + start)
        path = L1Path(problem, self.metric, self.method, restart=self.restart)
        quadratic = path.quadratic
        best = self._round_off(quadratic, begin.weight, mask)
        history: list[Mapping[str, float]] = []
        steps, failures = 0, 0
        if isinstance(problem.pattern, FixedMask):
            return self._finish(problem, best, steps, history)
        search = PenaltySearch(_first_penalty(problem))
        path.start(best.weight if self.from_best else quadratic.dense)
        for _ in range(self.max_rounds):
            if self.from_best:
                path.start(best.weight)
            point = path.minimize(search.penalty, self.tolerance, self.max_iterations)
            current, iterations = path.weight(point), point.iterations
            steps += iterations
            mask = problem.pattern.mask(self._scores(quadratic, current))
            candidate = self._round_off(quadratic, current, mask)
            rounding = _rounding_error(quadratic, current, mask)
            share = rounding / max(candidate.rounded, 1e-300)
            history.append(
                {
                    "penalty": search.penalty,
                    "iterations": iterations,
                    "sparsity": float((current == 0).double().mean()),
                    "rounding_share": share,
                    "objective": candidate.objective,
                }
            )
            if on_iteration is not None:
                on_iteration(history[-1])
            failures = 0 if candidate.objective < best.objective else failures + 1
            best = min(best, candidate, key=lambda entry: entry.objective)
            search.update(too_small=share > self._ratio(problem.pattern))
            if failures >= self.patience or search.finished:
                break
        return self._finish(problem, best, steps, history)

    def _round_off(
        self, quadratic: Quadratic, weight: Tensor, mask: Tensor
    ) -> "_Candidate":
        """Round weights to the mask, polish them, and compute their objective."""
        problem = quadratic.problem
        rounded = torch.where(mask, weight.to(quadratic.dense.dtype), 0)
        rest = residual(problem, rounded)
        total = float(objective_from_residual(problem, rounded, rest).sum()) ** 0.5
        if not self.polish:
            return _Candidate(rounded, mask, total**2, total)
        rhs = rest.to(rounded.dtype)
        polished = rounded + polish(quadratic.gram, mask, rhs, self.polish)
        objective = float(objective_rows(problem, polished, damped=True).sum())
        if not objective < total**2:  # float32 on a gram that needs float64
            return _Candidate(rounded, mask, total**2, total)
        return _Candidate(polished, mask, objective, total)

    def _finish(
        self,
        problem: LayerProblem,
        best: "_Candidate",
        steps: int,
        history: list[Mapping[str, float]],
    ) -> Answer:
        if self.refit:
            refit = LeastSquares(memory_budget=self.memory_budget)
            answer = refit.refit(problem, best.weight, best.mask)
        else:
            stats = {"damping": problem.damping}
            answer = Answer(best.weight, best.mask, stats=stats)
        return replace(answer, iterations=steps, history=tuple(history))


def fista_paper() -> Fista:
    """FISTAPruner's own setting: K=20 plain steps a round, xi=0.3, T=3, no refit."""
    return Fista(
        name="fista-paper",
        ratio=0.3,
        rounding="magnitude",
        max_rounds=30,
        tolerance=0,
        max_iterations=20,
        method="fista",
        metric="gram",
        restart=False,
        polish=0,
        refit=False,
        from_best=True,
        warm_start=None,
    )


class PenaltySearch:
    """Bracket, then bisect, the penalty on a log scale."""

    def __init__(self, first: float) -> None:
        self.penalty = first
        self._lower, self._upper = 0.0, float("inf")

    @property
    def finished(self) -> bool:
        """Whether the bracket is so narrow that its ends give the same masks."""
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


def _rounding_error(quadratic: Quadratic, weight: Tensor, mask: Tensor) -> float:
    """``||(U_R - U) Xhat||_F`` of the entries that rounding removed, damped."""
    lost = torch.where(mask, 0, weight)
    squared = float(((lost @ quadratic.gram) * lost).sum())
    return math.sqrt(max(squared, 0))

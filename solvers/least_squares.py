r"""Exact refit: the best weights on a fixed mask, every row certified.

Row i with support S minimises the damped objective over vectors that vanish outside S;
the change d from any starting point solves ``d_S G_SS = r_S`` with r the residual
``T - w G``. Two inner solvers find d, in the precision in which the gram factors:

- direct: gather the systems of many rows and factor them as one batch, O(kept^3 / 3) a
  row, or O(removed^3 / 3) on the complement (:mod:`.row_systems`);
- cg: conjugate gradients on all rows at once, preconditioned by a model of the gram that
  is inverted exactly on every support, O(2 in^2) a row and iteration
  (:mod:`.conjugate_gradients`).

Weights and residuals are float64, and each correction repeats until the certificate
``||L^-1 r||^2`` of every row is below the tolerance (iterative refinement); rows that are
there leave. Starting at the dense weight, a full mask returns it bit for bit.

References
----------
.. [1] V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models",
   TMLR 2024, arXiv:2401.02938 (the problem with a fixed mask).
.. [2] X. Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
   Large Language Models", NeurIPS 2024, arXiv:2406.07831, section 3.3 (conjugate
   gradients over all rows).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.certificates import (
    ENERGY_FLOOR,
    RefitState,
    certificate_of,
    refit_state,
)
from layerwise.chunks import in_chunks
from layerwise.errors import MemoryBudgetError
from layerwise.evaluate import evaluate
from layerwise.patterns import FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import OnIteration, Solution, Status
from layerwise.solvers.conjugate_gradients import Products, SupportSolver
from layerwise.solvers.options import check_at_least, check_one_of
from layerwise.solvers.row_systems import solve_on_complements, solve_on_supports

Round = Callable[[RefitState, Tensor], Tensor]  # state, open rows -> changes

REFINEMENTS = 6
EXPECTED_ITERATIONS = 60  # of cg on full rows; fewer in proportion to what is kept
BATCH_EFFICIENCY = 8  # a flop of a batched factorization takes this many of a product's
PATIENCE = 2.0  # cg may cost this multiple of the direct solver before it gives up
STALLED = 0.7  # rounds end where no certificate falls below this share of the last
FIRST_AIM, NEXT_AIM = 1.5, 0.7  # times the tolerance; certificates tighten on the way
ARRAYS_PER_ROW = 12  # (in,) vectors of float64 that cg and the certificate keep per row
CACHED_ROWS = 512  # more at a time leave the caches of a processor
RANK_SHARE, LARGEST_RANK = 64, 256  # the model has in / 64 directions


@dataclass(frozen=True)
class LeastSquares:
    """Refit on a :class:`FixedMask`, to a certified excess per row.

    Parameters
    ----------
    tolerance
        Bound on the excess of every row, relative to its damped optimum.
    method
        ``"direct"``, ``"cg"``, or ``"auto"``: the cheaper one, and direct for rows on
        which cg missed the tolerance.
    max_iterations
        Of cg, per correction.
    rank
        Directions of the model that preconditions cg; None is a 64th of the width, 0 the
        diagonal alone.
    products
        Precision of cg's products with the gram: ``"bfloat16"``, ``"float32"``, or
        ``"auto"``, bfloat16 where the device has units for it. The answer is certified in
        float64 in every case.
    memory_budget
        Bytes for the row systems; rows are solved in chunks that fit, and chunks that do
        not fit the device after all are halved.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram", "mask"})
    guarantee: ClassVar[str] = "certified excess"
    name: str = "least-squares"
    tolerance: float = 1e-8
    method: Literal["auto", "direct", "cg"] = "auto"
    max_iterations: int = 300
    rank: int | None = None
    products: Products = "auto"
    memory_budget: int = 1 << 30

    def __post_init__(self) -> None:
        check_one_of(self, "method", "auto", "direct", "cg")
        check_one_of(self, "products", "auto", "bfloat16", "float32")
        if self.rank is not None:
            check_at_least(self, rank=0)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Only a fixed mask leaves a least squares problem."""
        return isinstance(problem.pattern, FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Solution | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Solution:
        """Refit all rows, from `initial` if it is given, else from the dense weight."""
        mask = problem.pattern.mask(problem.weight)
        start = problem.weight if initial is None else initial.weight
        return self._solve(problem, start, mask)

    def refit(self, problem: LayerProblem, weight: Tensor, mask: Tensor) -> Solution:
        """Refit weights on the mask that a method found for a problem.

        Optimal weights are optimal for the problem as posed only if it fixes the mask.
        """
        found = self._solve(problem.with_pattern(FixedMask(mask)), weight, mask)
        if found.status is Status.OPTIMAL and not self.can_solve(problem):
            found = replace(found, status=Status.FEASIBLE)
        return found

    def _solve(self, problem: LayerProblem, start: Tensor, mask: Tensor) -> Solution:
        damping = problem.factor(torch.float64).damping
        problem = problem.with_damping(damping)
        weight = torch.where(mask, start.to(problem.dtype), 0)
        excess = torch.zeros_like(problem.energy)
        pending = torch.arange(len(weight), device=weight.device)
        iterations = 0
        for method in self._methods(problem, mask):
            refit = _Refit(self, problem, weight, mask, excess, method)
            in_chunks(pending, self._chunk(problem, mask[pending], method), refit)
            iterations += refit.iterations
            pending = (~(excess <= self.tolerance)).nonzero()[:, 0]
            if len(pending) == 0:
                break
        certificate = certificate_of(excess)
        return evaluate(
            problem,
            weight,
            mask,
            Status.OPTIMAL if len(pending) == 0 else Status.MAX_ITERATIONS,
            certificate=certificate,
            iterations=iterations,
            stats={"damping": damping},
        )

    def _methods(self, problem: LayerProblem, mask: Tensor) -> tuple[str, ...]:
        if self.method != "auto":
            return (self.method,)
        return ("direct",) if direct_pays(problem, mask) else ("cg", "direct")

    def _rank(self, width: int) -> int:
        return min(width // RANK_SHARE, LARGEST_RANK) if self.rank is None else self.rank

    def _chunk(self, problem: LayerProblem, mask: Tensor, method: str) -> int:
        """Rows that fit the memory budget."""
        width = problem.shape[1]
        itemsize = _precision(problem).itemsize
        per_row = 8 * ARRAYS_PER_ROW * width
        if method == "direct":
            per_row += 3 * _smaller_side(mask) ** 2 * itemsize
        else:
            per_row += 3 * self._rank(width) ** 2 * itemsize
        chunk = self.memory_budget // per_row
        if method == "cg" and mask.device.type == "cpu":
            chunk = min(chunk, CACHED_ROWS)
        if chunk < 1:
            message = (
                f"one row of this refit needs {per_row} bytes, the memory budget is "
                f"{self.memory_budget}; raise it or use LeastSquares(method='cg')"
            )
            raise MemoryBudgetError(message)
        return int(chunk)


class _Refit:
    """Refit some rows in place by one method; called chunk by chunk."""

    def __init__(
        self,
        solver: LeastSquares,
        problem: LayerProblem,
        weight: Tensor,  # (out, in), updated
        mask: Tensor,  # (out, in)
        excess: Tensor,  # (out,), updated
        method: str,
    ) -> None:
        self._solver, self._problem, self._method = solver, problem, method
        self._weight, self._mask, self._excess = weight, mask, excess
        self.iterations = 0  # of the chunk that took most
        self._of_chunk = 0

    def __call__(self, rows: Tensor) -> None:
        """Correct the rows until the certificate of each is below the tolerance."""
        part = self._problem.rows(rows)
        current, kept = self._weight[rows].double(), self._mask[rows]
        state = refit_state(part, current, kept)
        rounds: list[Round] | None = None
        self._of_chunk = 0
        for _ in range(REFINEMENTS):
            open_rows = ~(state.relative <= self._solver.tolerance)
            if not bool(open_rows.any()):
                break
            if rounds is None:
                rounds = self._direct(kept) if self._method == "direct" else self._cg(kept)
            trial = current + rounds[0](state, open_rows)
            trial = trial.to(self._problem.dtype).double()  # what will be returned
            found = refit_state(part, trial, kept)
            better = found.relative < state.relative
            helped = bool((found.relative < STALLED * state.relative)[open_rows].any())
            current = torch.where(better[:, None], trial, current)
            state = found.where(better, state)
            if not helped:
                rounds = rounds[1:]
                if not rounds:
                    break
        self._weight[rows] = current.to(self._weight.dtype)
        self._excess[rows] = state.relative

    def _direct(self, kept: Tensor) -> list[Round]:
        moments, damping = self._problem.moments, self._problem.damping
        precision = _precision(self._problem)
        if _smaller_side(kept) < int(kept.sum(dim=1).amax()):
            inverse = moments.shared(
                ("inverse", damping, precision),
                lambda: torch.cholesky_inverse(
                    self._problem.factor(torch.float64).lower
                ).to(precision),
            )
            correct = solve_on_complements(inverse, kept)
        else:
            correct = solve_on_supports(self._problem.damped_gram(precision), kept)

        def on_all(state: RefitState, open_rows: Tensor) -> Tensor:
            return torch.where(open_rows[:, None], correct(state.residual), 0)

        return [on_all]

    def _cg(self, kept: Tensor) -> list[Round]:
        """Rounds with rounded products, if there are any, and with exact ones."""
        problem, solver = self._problem, self._solver
        rank, products = solver._rank(problem.shape[1]), solver.products
        precision = _precision(problem)
        system = problem.moments.shared(
            ("support solver", problem.damping, precision, rank, products),
            lambda: SupportSolver(problem.damped_gram(precision), rank, products),
        )
        limit = solver.max_iterations
        if solver.method == "auto":
            worth = PATIENCE * _flops_of_direct(kept) / _flops_of_iteration(problem)
            limit = min(limit, 1 + int(worth))
        aim = FIRST_AIM * solver.tolerance

        def on_open(state: RefitState, open_rows: Tensor, *, rounded: bool) -> Tensor:
            nonlocal aim
            picked = open_rows.nonzero()[:, 0]
            step, used = system.solve(
                kept[picked],
                state.residual[picked],
                state.objective[picked],
                ENERGY_FLOOR * state.energy[picked],
                state.excess[picked],
                aim,
                limit,
                rounded=rounded,
            )
            self._of_chunk += used
            self.iterations = max(self.iterations, self._of_chunk)
            aim = NEXT_AIM * solver.tolerance
            change = torch.zeros_like(state.residual)
            change[picked] = step
            return change

        choices = (True, False) if system.can_round else (False,)
        return [partial(on_open, rounded=rounded) for rounded in choices]


def direct_pays(problem: LayerProblem, mask: Tensor) -> bool:
    """Whether factoring the system of every row is expected to be the cheaper way."""
    share = float(mask.sum(dim=1).amax()) / problem.shape[1]
    iterations = EXPECTED_ITERATIONS * share
    return _flops_of_direct(mask) <= iterations * _flops_of_iteration(problem)


def _precision(problem: LayerProblem) -> torch.dtype:
    """Precision of the inner solvers: float64 if the weight or the gram needs it."""
    factor = problem.factor(torch.float64)
    return problem.dtype if factor.holds_in(problem.dtype) else torch.float64


def _smaller_side(mask: Tensor) -> int:
    """Most weights that a row keeps, or that it loses, whichever is less."""
    kept = mask.sum(dim=1)
    return min(int(kept.amax()), int((mask.shape[1] - kept).amax()))


def _flops_of_direct(mask: Tensor) -> float:
    return BATCH_EFFICIENCY * _smaller_side(mask) ** 3 / 3


def _flops_of_iteration(problem: LayerProblem) -> float:
    return 2.0 * problem.shape[1] ** 2

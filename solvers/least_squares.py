r"""Exact refit: the best weights on a fixed mask, every row certified.

Row i with support S minimises the damped objective over vectors that vanish outside S.
The change d from any starting point solves ``d_S G_SS = r_S`` with r the residual
``T - w G``. Alternatively, the dual problem is solved, for the multipliers of the removed
weights. Two inner solvers work for both, in the precision in which the gram factors:

- direct: gather the systems of many rows and factor them as one batch, O(kept^3 / 3) or
  O(removed^3 / 3) a row (:mod:`.row_systems`);
- cg: conjugate gradients on all rows at once, O(2 in^2) a row and iteration
  (:mod:`.conjugate_gradients`).

Weights and residuals are float64. Corrections (:mod:`.rounds`) are repeated until the
certificate of every row (:func:`layerwise.certificates.refit_state`) is below the
tolerance: iterative refinement. Rows below it are finished and not corrected again. If both
models see the same inputs, a full mask returns the dense weight bit for bit.

References
----------
.. [1] V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models",
   TMLR 2024, arXiv:2401.02938 (the problem with a fixed mask).
.. [2] X. Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
   Large Language Models", NeurIPS 2024, arXiv:2406.07831, section 3.3 (conjugate
   gradients over all rows).

The dual systems for conjugate gradients are our own.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.certificates import (
    RefitState,
    certificate_of,
    dense_state,
    refit_state,
)
from layerwise.chunks import in_chunks
from layerwise.errors import MemoryBudgetError
from layerwise.patterns import FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start, Status
from layerwise.solver import OnIteration
from layerwise.solvers.options import check_at_least, check_one_of
from layerwise.solvers.refit.conjugate_gradients import Products
from layerwise.solvers.refit.rounds import (
    ConjugateRounds,
    Round,
    Side,
    direct_rounds,
    inner_precision,
)
from layerwise.solvers.refit.spread import complement_is_easier

REFINEMENTS = 6
EXPECTED_ITERATIONS = 60  # of cg, times the share of the unknowns
BATCH_EFFICIENCY = 8  # time of a flop in a batched factorization, over one in a product
PATIENCE = 2.0  # largest cost of cg, in units of the direct solver
MOSTLY_KEPT, MOSTLY_REMOVED = 0.35, 0.7  # removed shares that decide the side of cg alone
STALLED = 0.7  # share of the previous certificate that the next one must fall below
ARRAYS_PER_ROW = 12  # (in,) vectors of float64 per row, for direct and the certificate
CG_ARRAYS = 20  # in the precision of cg: its batch, and the smaller batch that follows
FLOAT64_ARRAYS = 6  # of cg, in addition
CACHED_ROWS = 512  # rows that fit the caches of a processor together
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
        Largest number of cg iterations per correction; with ``"auto"`` also limited by
        the cost of direct.
    rank
        Directions of the model that preconditions cg on supports. None is a 64th of the
        width, 0 means the diagonal alone.
    products
        Precision of cg's products with the gram: ``"bfloat16"``, ``"float32"``, or
        ``"auto"``, bfloat16 if the device has units for it. The answer is certified in
        float64 in every case.
    side
        Unknowns of the systems: the weights on the ``"support"`` of a row, the multipliers
        of the removed weights on its ``"complement"``, or ``"auto"``, the side with the
        smaller expected time.
    memory_budget
        Bytes for the row systems. Rows are solved in chunks that fit; chunks that still
        exceed the memory of the device are halved.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram", "mask"})
    guarantee: ClassVar[str] = "certified excess"
    name: str = "least-squares"
    tolerance: float = 1e-8
    method: Literal["auto", "direct", "cg"] = "auto"
    max_iterations: int = 300
    rank: int | None = None
    products: Products = "auto"
    side: Literal["auto", "support", "complement"] = "auto"
    memory_budget: int = 1 << 30

    def __post_init__(self) -> None:
        check_one_of(self, "method", "auto", "direct", "cg")
        check_one_of(self, "products", "auto", "bfloat16", "float32")
        check_one_of(self, "side", "auto", "support", "complement")
        check_at_least(self, max_iterations=0, tolerance=0, memory_budget=1)
        if self.rank is not None:
            check_at_least(self, rank=0)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Only a fixed mask: the problem is then a least squares problem."""
        return isinstance(problem.pattern, FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Refit all rows, from `initial` if given, else from the dense weight."""
        mask = problem.pattern.mask(problem.weight)
        start = problem.weight if initial is None else initial.weight
        return self._solve(problem, start, mask)

    def refit(self, problem: LayerProblem, weight: Tensor, mask: Tensor) -> Answer:
        """Refit weights on the mask that a method found for a problem.

        Optimal weights are optimal for the problem as posed only if it fixes the mask.
        """
        answer = self._solve(problem.with_pattern(FixedMask(mask)), weight, mask)
        if answer.status is Status.OPTIMAL and not self.can_solve(problem):
            answer = replace(answer, status=Status.FEASIBLE)
        return answer

    def _solve(self, problem: LayerProblem, start: Tensor, mask: Tensor) -> Answer:
        damping = problem.factor(torch.float64).damping
        problem = problem.with_damping(damping)
        weight = torch.where(mask, start.to(problem.dtype), 0)
        excess = torch.zeros_like(problem.energy)
        pending = mask.any(dim=1).nonzero()[:, 0]  # rows that keep nothing are done
        iterations = 0
        for method in self._methods(problem, mask[pending]):
            side = self._side(problem, mask[pending], method)
            refit = _Refit(self, problem, weight, mask, excess, method, side)
            try:
                in_chunks(pending, self._chunk(problem, mask[pending], method, side), refit)
            except MemoryBudgetError:
                if iterations == 0:
                    raise
                break  # keep the results of cg
            iterations += refit.iterations
            pending = (~(excess <= self.tolerance)).nonzero()[:, 0]
            if len(pending) == 0:
                break
        certificate = certificate_of(excess)
        return Answer(
            weight,
            mask,
            Status.OPTIMAL if len(pending) == 0 else Status.MAX_ITERATIONS,
            certificate=certificate,
            iterations=iterations,
            stats={"damping": damping},
        )

    def _methods(self, problem: LayerProblem, mask: Tensor) -> tuple[str, ...]:
        if len(mask) == 0:
            return ()
        if self.method != "auto":
            return (self.method,)
        pays = direct_pays(problem, mask, self.side)
        return ("direct",) if pays else ("cg", "direct")

    def _side(self, problem: LayerProblem, mask: Tensor, method: str) -> Side:
        """Side with fewer unknowns; for cg and similar numbers, with less expected time."""
        if self.side != "auto":
            return self.side
        if method == "direct":
            less = _unknowns(mask, "complement") < _unknowns(mask, "support")
            return "complement" if less else "support"
        removed = 1 - float(mask.sum()) / mask.numel()
        if not MOSTLY_KEPT < removed < MOSTLY_REMOVED:
            return "complement" if removed <= MOSTLY_KEPT else "support"
        rank = self._rank(problem.shape[1])
        return "complement" if complement_is_easier(problem, mask, rank) else "support"

    def _rank(self, width: int) -> int:
        return min(width // RANK_SHARE, LARGEST_RANK) if self.rank is None else self.rank

    def _chunk(self, problem: LayerProblem, mask: Tensor, method: str, side: Side) -> int:
        """Rows that fit the memory budget."""
        width = problem.shape[1]
        itemsize = inner_precision(problem).itemsize
        if method == "direct":
            per_row = 8 * ARRAYS_PER_ROW * width
            per_row += 3 * _unknowns(mask, side) ** 2 * itemsize
        else:
            per_row = cg_row_bytes(width, itemsize)
            if side == "support":
                per_row += 3 * self._rank(width) ** 2 * itemsize
        chunk = self.memory_budget // per_row
        if method == "cg" and mask.device.type == "cpu":
            chunk = min(chunk, CACHED_ROWS)
        if chunk < 1:
            message = (
                f"one row of this refit needs {per_row} bytes, the memory budget is "
                f"{self.memory_budget}: raise it"
            )
            if method == "direct":
                message += " or use LeastSquares(method='cg')"
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
        side: Side,
    ) -> None:
        self._solver, self._problem = solver, problem
        self._weight, self._mask, self._excess = weight, mask, excess
        self._method = method
        self._side: Side = side
        self.iterations = 0  # largest number of all chunks

    def __call__(self, rows: Tensor) -> None:
        """Correct the rows until the certificate of each is below the tolerance."""
        part = self._problem.rows(rows)
        current, kept = self._weight[rows].double(), self._mask[rows]
        state, first = self._begin(part, current, kept)
        rounds: list[Round] = []
        conjugate: ConjugateRounds | None = None
        for _ in range(REFINEMENTS):
            picked = self._open(state, rounds[0].above if rounds else 1.0)
            if len(picked) == 0:
                break
            if not rounds and self._method == "direct":
                rounds = direct_rounds(part, kept, self._side)
            elif not rounds:
                conjugate = self._conjugate_rounds(part, kept)
                rounds = conjugate.rounds()
            whole = len(picked) == len(rows)
            open_part, before = (
                (part, state) if whole else (part.rows(picked), state.rows(picked))
            )
            change, multipliers = rounds[0].correct(before, picked)
            trial = change.add_(current[picked])
            trial = trial.to(self._problem.dtype).double()  # rounded as it is returned
            after = refit_state(open_part, trial, kept[picked], multipliers)
            better = (after.relative < before.relative).nonzero()[:, 0]
            fell = after.relative < STALLED * before.relative
            current[picked[better]] = trial[better]
            state.put(picked[better], after.rows(better))
            if len(rounds) > 1 and not bool(fell.all()):
                rounds = rounds[1:]
            elif not bool(fell.any()):
                break
        better = state.relative <= first
        self._weight[rows[better]] = current[better].to(self._weight.dtype)
        self._excess[rows] = torch.where(better, state.relative, first)
        if conjugate is not None:
            self.iterations = max(self.iterations, conjugate.iterations)

    def _begin(
        self, part: LayerProblem, weight: Tensor, kept: Tensor
    ) -> tuple[RefitState, Tensor]:
        """State of the rows, and the proven relative excess of each at the start, (rows,).

        On complements, rows that are not optimal restart in place at the dense weight and
        zero multipliers: with multipliers that do not match the weights, a row would stop
        too early.
        """
        if self._method == "direct" or self._side == "support":
            state = refit_state(part, weight, kept)
            return state, state.relative.clone()
        dense = torch.where(kept, part.weight.double(), 0)
        if torch.equal(weight, dense):
            state = dense_state(part, kept)
            return state, state.relative.clone()
        state = refit_state(part, weight, kept)
        first, picked = state.relative.clone(), self._open(state)
        if len(picked) > 0:
            weight[picked] = dense[picked]
            state.put(picked, dense_state(part.rows(picked), kept[picked]))
        return state, first

    def _open(self, state: RefitState, above: float = 1.0) -> Tensor:
        """Indices of the rows that are not certified to a multiple of the tolerance."""
        return (~(state.relative <= above * self._solver.tolerance)).nonzero()[:, 0]

    def _conjugate_rounds(self, part: LayerProblem, kept: Tensor) -> ConjugateRounds:
        solver = self._solver
        limit = solver.max_iterations
        if solver.method == "auto":
            direct = _flops_of_direct(_unknowns(kept, solver.side))
            worth = PATIENCE * direct / _flops_of_iteration(part)
            limit = min(limit, 1 + int(worth))
        return ConjugateRounds(
            part,
            kept,
            self._side,
            solver._rank(part.shape[1]),
            solver.products,
            solver.tolerance,
            limit,
        )


def cg_row_bytes(width: int, itemsize: int) -> int:
    """Bytes that conjugate gradients keep per row, with entries of `itemsize` bytes."""
    return (CG_ARRAYS * itemsize + FLOAT64_ARRAYS * 8) * width


def direct_pays(
    problem: LayerProblem, mask: Tensor, side: Side | Literal["auto"] = "auto"
) -> bool:
    """Whether a factorization per row is expected to be cheaper than cg."""
    unknowns = _unknowns(mask, side)
    iterations = EXPECTED_ITERATIONS * unknowns / problem.shape[1]
    return _flops_of_direct(unknowns) <= iterations * _flops_of_iteration(problem)


def _unknowns(mask: Tensor, side: Side | Literal["auto"]) -> int:
    """Largest number of kept or of removed weights of a row, or the smaller of both."""
    kept = mask.sum(dim=1)
    most = {
        "support": int(kept.amax()),
        "complement": mask.shape[1] - int(kept.amin()),
    }
    return min(most.values()) if side == "auto" else most[side]


def _flops_of_direct(unknowns: int) -> float:
    return BATCH_EFFICIENCY * unknowns**3 / 3


def _flops_of_iteration(problem: LayerProblem) -> float:
    return 2.0 * problem.shape[1] ** 2

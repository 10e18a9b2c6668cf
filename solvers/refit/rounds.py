r"""Rounds of the exact refit: one correction of the rows that are not optimal yet.

Let S be the support of a row, P its complement, T the target and ``H = G^-1``. The change d
of the weights satisfies ``d_S G_SS = r_S``. Dually, the multipliers y of the weights that
have to be zero satisfy ``y_P H_PP = (T H)_P``, and the weights are ``T H - y H``. Either
system is solved by factorizations (:mod:`.row_systems`) or by conjugate gradients
(:mod:`.conjugate_gradients`):

- on supports, the diagonal and a low-rank model of G precondition (:mod:`.factor_model`);
- on complements, the diagonal alone preconditions, even if G is ill-conditioned. H_PP has
  only a few small eigenvalues, from directions that many inputs share; the large ones are
  nearly equal, at the inverse of the damping.

Fewer unknowns mean fewer iterations; :mod:`.spread` estimates which side is faster.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.certificates import ENERGY_FLOOR, RefitState
from layerwise.problem import LayerProblem
from layerwise.solvers.refit.conjugate_gradients import Products, SupportSolver
from layerwise.solvers.refit.row_systems import (
    RowSolve,
    solve_on_complements,
    solve_on_supports,
)

Side = Literal["support", "complement"]

FAR = 100.0  # times the tolerance: a smaller excess may be the rounding of the weights
AIM = 0.6  # share of the tolerance at which conjugate gradients stop


class Correction(NamedTuple):
    """Result of a round for some rows, float64, shape (picked, in)."""

    change: Tensor
    multipliers: Tensor | None = None  # None for the natural ones of the new weights


class Round(NamedTuple):
    """One way to correct rows, and the excess from which it is used."""

    # from the state of some rows, and their indices in the chunk in ascending order
    correct: Callable[[RefitState, Tensor], Correction]
    above: float = 1.0  # times the tolerance: rows with a smaller excess are not changed


def inner_precision(problem: LayerProblem) -> torch.dtype:
    """Precision of factorizations: float64 if the weight or the gram needs it."""
    factor = problem.factor(torch.float64)
    return problem.dtype if factor.holds_in(problem.dtype) else torch.float64


def inverse_of(problem: LayerProblem, precision: torch.dtype) -> Tensor:
    """Inverse of the damped gram, as accurate as the rounded factor allows."""
    return torch.cholesky_inverse(problem.factor(torch.float64).lower.to(precision))


def direct_rounds(problem: LayerProblem, kept: Tensor, side: Side) -> list[Round]:
    """Rounds that factor the system of every row.

    Rows for which float32 is not enough are factored again in float64.
    """
    precision = inner_precision(problem)
    correct = _row_solve(problem, kept, side, precision)

    def step(state: RefitState, picked: Tensor) -> Correction:
        residual = torch.zeros(kept.shape, dtype=torch.float64, device=kept.device)
        residual[picked] = state.residual
        return Correction(correct(torch.where(kept, residual, 0))[picked])

    def precise(state: RefitState, picked: Tensor) -> Correction:
        parts = []
        # half of the rows in float64 need as much memory as all in float32
        for part in torch.arange(len(picked), device=picked.device).chunk(2):
            on = kept[picked[part]]
            solved = _row_solve(problem.rows(picked[part]), on, side, torch.float64)
            parts.append(solved(torch.where(on, state.residual[part], 0)))
        return Correction(torch.cat(parts))

    if precision == torch.float64:
        return [Round(step)]
    return [Round(step), Round(precise, FAR)]


def _row_solve(
    problem: LayerProblem, kept: Tensor, side: Side, precision: torch.dtype
) -> RowSolve:
    if side == "support":
        return solve_on_supports(problem.damped_gram(precision), kept)
    key = ("inverse", problem.damping, precision)
    inverse = problem.moments.shared(key, lambda: inverse_of(problem, precision))
    return solve_on_complements(inverse, kept)


class ConjugateRounds:
    """Rounds by conjugate gradients, on supports or on complements.

    On complements, the first round begins at the dense weight and at zero multipliers
    (:func:`layerwise.certificates.dense_state`).

    Parameters
    ----------
    problem
        The rows of a chunk, at the damping at which the gram factors.
    kept
        Their masks, shape (rows, in).
    side
        Unknowns of the systems, see :class:`~layerwise.solvers.LeastSquares`.
    rank
        Rank of the model of the gram, for supports.
    products
        Precision of the products.
    tolerance
        Tolerance of the refit.
    max_iterations
        Largest number of iterations per round.
    """

    def __init__(
        self,
        problem: LayerProblem,
        kept: Tensor,
        side: Side,
        rank: int,
        products: Products,
        tolerance: float,
        max_iterations: int,
    ) -> None:
        self._problem, self._kept, self._side = problem, kept, side
        self._tolerance, self._limit = tolerance, max_iterations
        self._at_dense = side == "complement"
        self.iterations = 0  # of all rounds
        self._rank = rank
        self._products: Products = products

    def _system(self, precision: torch.dtype) -> SupportSolver:
        problem = self._problem

        def make() -> SupportSolver:
            if self._side == "complement":
                return SupportSolver(inverse_of(problem, precision), 0, self._products)
            gram = problem.damped_gram(precision)
            return SupportSolver(gram, self._rank, self._products)

        kind = ("conjugate gradients", self._side, self._rank, self._products)
        return problem.moments.shared((*kind, problem.damping, precision), make)

    def rounds(self) -> list[Round]:
        """Rounds with rounded products if possible, with exact products, and in float64.

        Float32 is tried even for a gram that does not factor in it, because it is often
        enough for conjugate gradients.
        """
        step = self._on_support if self._side == "support" else self._on_complement
        precision, factor = self._problem.dtype, self._problem.factor(torch.float64)
        system = self._system(precision if factor.fits(precision) else torch.float64)
        choices = (True, False) if system.can_round else (False,)
        rounds = [Round(partial(step, system=system, rounded=one)) for one in choices]
        if system.gram.dtype != torch.float64:
            enough = inner_precision(self._problem) != torch.float64
            rounds.append(Round(partial(self._precise, step), FAR if enough else 1.0))
        return rounds

    def _precise(
        self, step: Callable[..., Correction], state: RefitState, picked: Tensor
    ) -> Correction:
        return step(state, picked, system=self._system(torch.float64), rounded=False)

    def _on_support(
        self, state: RefitState, picked: Tensor, *, system: SupportSolver, rounded: bool
    ) -> Correction:
        kept = self._kept[picked]
        rhs = torch.where(kept, state.residual, 0)
        change = self._solve(system, kept, rhs, state.objective, state, rounded=rounded)
        return Correction(change)

    def _on_complement(
        self, state: RefitState, picked: Tensor, *, system: SupportSolver, rounded: bool
    ) -> Correction:
        removed = ~self._kept[picked]
        if self._at_dense and self._problem.shift is None:  # the step is known
            step = torch.where(removed, self._problem.weight[picked].double(), 0)
        else:
            factor = self._problem.factor(torch.float64)
            step = factor.solve_rows(state.residual).contiguous()
        self._at_dense = False
        rhs = torch.where(removed, step, 0)
        bound = state.objective - state.excess  # the dual objective
        rise = self._solve(system, removed, rhs, bound, state, rounded=rounded)
        step -= system.image(rise)
        rise += state.multipliers
        return Correction(step.masked_fill_(removed, 0), rise)

    def _solve(
        self,
        system: SupportSolver,
        mask: Tensor,  # (picked, in)
        rhs: Tensor,  # (picked, in)
        value: Tensor,  # (picked,)
        state: RefitState,
        *,
        rounded: bool,
    ) -> Tensor:  # (picked, in)
        solution, iterations = system.solve(
            mask,
            rhs,
            value,
            ENERGY_FLOOR * state.energy,
            state.excess,
            AIM * self._tolerance,
            self._limit,
            rounded=rounded,
            rises=self._side == "complement",
        )
        self.iterations += iterations
        return solution

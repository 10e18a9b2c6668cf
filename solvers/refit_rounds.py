r"""Rounds of the exact refit: one correction of the rows that are not optimal yet.

With S the support of a row, P its complement, T the target and ``H = G^-1``, the change d
of the weights satisfies ``d_S G_SS = r_S``. Or, the other way round, the multipliers y of
the weights that have to be zero satisfy ``y_P H_PP = (T H)_P``, and the weights are
``T H - y H``. Either system is solved by factorizations (:mod:`.row_systems`) or by
conjugate gradients (:mod:`.conjugate_gradients`):

- on supports: the diagonal and a low-rank model of G precondition (:mod:`.factor_model`);
- on complements: G need not be well conditioned for it. The small eigenvalues of H_PP are
  those of directions that many inputs share, and there are few of them; the large ones are
  level, at the inverse of the damping, so that the diagonal alone preconditions.

Fewer unknowns mean fewer iterations; :mod:`.spread` says which side has the advantage.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from layerwise.certificates import ENERGY_FLOOR, RefitState
from layerwise.problem import LayerProblem
from layerwise.solvers.conjugate_gradients import Products, SupportSolver
from layerwise.solvers.row_systems import solve_on_complements, solve_on_supports

Side = Literal["support", "complement"]

AIM = 0.6  # share of the tolerance at which conjugate gradients believe to be done


class Correction(NamedTuple):
    """What a round found for some rows, float64, shape (picked, in)."""

    change: Tensor
    multipliers: Tensor | None = None  # None for the natural ones of the new weights


# of the state of some rows and their indices in the chunk, in order
Round = Callable[[RefitState, Tensor], Correction]


def inner_precision(problem: LayerProblem) -> torch.dtype:
    """Precision of inner solvers: float64 if the weight or the gram needs it."""
    factor = problem.factor(torch.float64)
    return problem.dtype if factor.holds_in(problem.dtype) else torch.float64


def inverse_of(problem: LayerProblem) -> Tensor:
    """Inverse of the damped gram in the precision of inner solvers.

    It errs by the rounding of the factor at worst, which is that of the inverse itself.
    """
    factor = problem.factor(torch.float64)
    return torch.cholesky_inverse(factor.lower.to(inner_precision(problem)))


def direct_round(problem: LayerProblem, kept: Tensor, side: Side) -> Round:
    """Solve the system of every row by a factorization of its own."""
    precision = inner_precision(problem)
    if side == "complement":
        key = ("inverse", problem.damping, precision)
        inverse = problem.moments.shared(key, lambda: inverse_of(problem))
        correct = solve_on_complements(inverse, kept)
    else:
        correct = solve_on_supports(problem.damped_gram(precision), kept)

    def step(state: RefitState, picked: Tensor) -> Correction:
        residual = torch.zeros(kept.shape, dtype=torch.float64, device=kept.device)
        residual[picked] = state.residual
        return Correction(correct(torch.where(kept, residual, 0))[picked])

    return step


class ConjugateRounds:
    """Rounds by conjugate gradients on one side of the masks.

    On complements, the first one begins at the dense weight and at zero multipliers
    (:func:`layerwise.certificates.dense_state`).

    Parameters
    ----------
    problem
        The rows of a chunk, at the damping at which the gram factors.
    kept
        Their masks, shape (rows, in).
    side
        Where the systems are posed.
    rank
        Of the model of the gram, for supports.
    products
        Precision of the products.
    tolerance
        Of the refit.
    max_iterations
        Per round.
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
        precision = inner_precision(problem)

        def make() -> SupportSolver:
            if side == "complement":
                return SupportSolver(inverse_of(problem), 0, products)
            return SupportSolver(problem.damped_gram(precision), rank, products)

        key = (side, problem.damping, precision, rank, products)
        self._system = problem.moments.shared(("conjugate gradients", *key), make)

    def rounds(self) -> list[Round]:
        """Rounds with rounded products, if there are any, and with exact ones."""
        choices = (True, False) if self._system.can_round else (False,)
        step = self._on_support if self._side == "support" else self._on_complement
        return [partial(step, rounded=rounded) for rounded in choices]

    def _on_support(
        self, state: RefitState, picked: Tensor, *, rounded: bool
    ) -> Correction:
        kept = self._kept[picked]
        right = torch.where(kept, state.residual, 0)
        change = self._solve(kept, right, state.objective, state, rounded=rounded)
        return Correction(change)

    def _on_complement(
        self, state: RefitState, picked: Tensor, *, rounded: bool
    ) -> Correction:
        removed = ~self._kept[picked]
        if self._at_dense and self._problem.shift is None:  # no need to solve for it
            step = torch.where(removed, self._problem.weight[picked].double(), 0)
        else:
            factor = self._problem.factor(torch.float64)
            step = factor.solve_rows(state.residual).contiguous()
        self._at_dense = False
        right = torch.where(removed, step, 0)
        bound = state.objective - state.excess  # the dual objective
        rise = self._solve(removed, right, bound, state, rounded=rounded)
        step -= self._system.image(rise)
        rise += state.multipliers
        return Correction(step.masked_fill_(removed, 0), rise)

    def _solve(
        self,
        mask: Tensor,  # (picked, in)
        right: Tensor,  # (picked, in)
        value: Tensor,  # (picked,)
        state: RefitState,
        *,
        rounded: bool,
    ) -> Tensor:  # (picked, in)
        found, used = self._system.solve(
            mask,
            right,
            value,
            ENERGY_FLOOR * state.energy,
            state.excess,
            AIM * self._tolerance,
            self._limit,
            rounded=rounded,
            rises=self._side == "complement",
        )
        self.iterations += used
        return found

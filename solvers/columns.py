r"""Removal of whole columns: the others are refitted, and a bias corrects the means.

If all weights of a column of W are zero, its input is useless, and the rows of the earlier
layers that compute this input can be removed at no cost. Two choices make a method. The
*score* selects the units of columns to remove (:mod:`layerwise.solvers.column.scores`, or a
search, :mod:`layerwise.solvers.column.search`). The *restoration* finds weights and bias:

=============  ========================================================================
restoration    weights and bias
=============  ========================================================================
none           kept weights are unchanged
bias           kept weights are unchanged; the best bias, ``W mu - What muhat`` [2]_
least-squares  best weights on the kept columns, one factorization for all rows [1]_
intercept      best weights and bias together: least squares about the means
=============  ========================================================================

References
----------
.. [1] H. Hu, P. Zhao, P. Li, Y. Zheng, Z. Wang, X. Yuan, "FASP: Fast and Accurate
   Structured Pruning of Large Language Models", 2025, arXiv:2501.09412.
.. [2] Y. An, X. Zhao, T. Yu, M. Tang, J. Wang, "Fluctuation-based Adaptive Structured
   Pruning for Large Language Models", AAAI 2024, arXiv:2312.11983, section 3.

Notes
-----
Deviations: (1) the damping of the refit pulls towards the dense weight; (2) units and
heads of the pattern decide which columns are removed together, and ties go by index;
(3) dense and pruned inputs may differ, and then the bias also corrects the shift from
earlier layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from layerwise.patterns import Columns, FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start, Status, mask_of
from layerwise.solver import OnIteration
from layerwise.solvers.column.refit import refit_columns
from layerwise.solvers.column.scores import (
    ABOUT_MEANS,
    COMPAT,
    SCORES,
    SEARCHES,
    Score,
    unit_scores,
)
from layerwise.solvers.column.search import exchange_until_none_helps, removal_path
from layerwise.solvers.column.support import ColumnSupport
from layerwise.solvers.options import check_at_least, check_one_of

Restoration = Literal["none", "bias", "least-squares", "intercept"]
RESTORATIONS = ("none", "bias", "least-squares", "intercept")
STEP_SHARE = 256  # a search moves one unit of this many at once, at least one
NOISE = 1e-12  # of the energy: smaller changes are rounding


@dataclass(frozen=True)
class ColumnPruning:
    """Choose columns by a score or a search, then restore the kept weights.

    Cost: O(out in) for a score, O(in^3 + out in^2) for `obs` and the searches, and
    O(kept^3 / 3 + out kept^2) for a refit.

    Parameters
    ----------
    score
        Rule or search that chooses the columns.
    restoration
        How the kept weights and the bias are found.
    step
        Units that a search moves at once; None for one of every 256, at least one.
    rounds
        Largest number of rounds of exchanges of `swaps`.
    tolerance
        Bound on the excess of every refitted row, relative to its damped optimum.
    """

    name: str = "columns"
    score: Score = "swaps"
    restoration: Restoration = "intercept"
    step: int | None = None
    rounds: int = 1000
    tolerance: float = 1e-8

    def __post_init__(self) -> None:
        check_one_of(self, "score", *SCORES)
        check_one_of(self, "restoration", *RESTORATIONS)
        check_at_least(self, rounds=0, tolerance=0)
        if self.step is not None:
            check_at_least(self, step=1)

    @property
    def requires(self) -> frozenset[str]:
        """Statistics that score and restoration read."""
        names = set()
        if self.score != "magnitude" or self.restoration in ("least-squares", "intercept"):
            names.add("gram")
        if self.score in ABOUT_MEANS or self.with_bias:
            names |= {"gram", "mean"}
        if self.score == COMPAT:
            names.add("fluctuation")
        return frozenset(names)

    @property
    def guarantee(self) -> str:
        """Guarantee of the answer, in words."""
        if self.restoration in ("least-squares", "intercept"):
            return "certified refit"
        return "best bias" if self.with_bias else "none"

    @property
    def with_bias(self) -> bool:
        """Whether the restoration adds a bias."""
        return self.restoration in ("bias", "intercept")

    def can_solve(self, problem: LayerProblem) -> bool:
        """Columns; a fixed mask of whole columns is only restored."""
        pattern = problem.pattern
        if isinstance(pattern, FixedMask):
            return bool((pattern.kept == pattern.kept[0]).all())
        return isinstance(pattern, Columns)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Choose the columns, then restore.

        The exchanges of `swaps` start from the mask of `initial` if it is feasible.
        """
        history: tuple[Mapping[str, float], ...] = ()
        about = self.restored(problem)
        if isinstance(problem.pattern, FixedMask):
            kept = problem.pattern.mask(problem.weight)[0]
        else:
            kept, history = self._choose(problem, about, initial, on_iteration)
        mask = kept.expand(problem.shape).clone()
        if self.restoration in ("none", "bias"):
            weight = torch.where(mask, problem.weight.to(problem.dtype), 0)
            return Answer(
                weight,
                mask,
                with_bias=self.with_bias,
                iterations=len(history),
                history=history,
            )
        weight, certificate, damping = refit_columns(about, kept, self.tolerance)
        status = Status.MAX_ITERATIONS
        if certificate.bound <= self.tolerance:
            fixed = isinstance(problem.pattern, FixedMask)
            status = Status.OPTIMAL if fixed else Status.FEASIBLE
        return Answer(
            weight,
            mask,
            status,
            with_bias=self.with_bias,
            certificate=certificate,
            iterations=len(history),
            history=history,
            stats={"damping": damping},
        )

    def _choose(
        self,
        problem: LayerProblem,
        about: LayerProblem,
        initial: Start | None,
        on_iteration: OnIteration | None,
    ) -> tuple[Tensor, tuple[Mapping[str, float], ...]]:
        """Kept columns, shape (in,), and the rounds of the search."""
        pattern = problem.pattern
        assert isinstance(pattern, Columns)
        units = pattern.units(problem.shape[1], problem.weight.device)
        if self.score not in SEARCHES or about.moments.vanishes:
            return pattern.keep_units(self.scores(problem, units))[units], ()
        support = ColumnSupport(about, units)
        heads, step = pattern.heads(len(support.kept), units.device), self.step_of(units)
        mask = None if initial is None else mask_of(initial, pattern)
        if self.score == "swaps" and mask is not None and pattern.accepts(mask):
            start = torch.zeros_like(support.kept)
            start[units[mask[0]]] = True
            support.restart(start)
        else:
            removal_path(support, heads, torch.bincount(heads) - pattern.keep, step)
        history: list[Mapping[str, float]] = []
        if self.score == "swaps":
            noise = NOISE * float(about.energy.sum())
            for entry in exchange_until_none_helps(
                support, heads, step, self.rounds, noise
            ):
                history.append(entry)
                if on_iteration is not None:
                    on_iteration(entry)
        return support.kept[units], tuple(history)

    def scores(self, problem: LayerProblem, units: Tensor) -> Tensor:
        """Score of every unit, shape (units,); for a search, those of its first step."""
        rule = "obs" if self.score in SEARCHES else self.score
        return unit_scores(
            self.restored(problem) if rule == "obs" else problem, units, rule
        )

    def restored(self, problem: LayerProblem) -> LayerProblem:
        """Problem that the restoration solves: about the means if there is a bias."""
        return problem.centered() if self.with_bias else problem

    def step_of(self, units: Tensor) -> int:
        """Number of units that a search moves at once."""
        return self.step or max(1, (int(units.max()) + 1) // STEP_SHARE)


def fasp() -> ColumnPruning:
    """Wanda scores summed over columns, best weights on the kept columns."""
    return ColumnPruning("fasp", score="wanda", restoration="least-squares")


def flap() -> ColumnPruning:
    """Columns by their weighted variance, weights unchanged, best bias."""
    return ColumnPruning("flap", score="wifv", restoration="bias")


def wanda_sp() -> ColumnPruning:
    """Wanda scores summed over columns, weights unchanged."""
    return ColumnPruning("wanda-sp", score="wanda", restoration="none")


def magnitude_sp() -> ColumnPruning:
    """Columns with the largest sums of ``|W|``, weights unchanged; uses no statistics."""
    return ColumnPruning("magnitude-sp", score="magnitude", restoration="none")

r"""The recommended composition: mask by ALPS, exact swaps, certified refit.

========  ===========================================================================
effort    steps
========  ===========================================================================
fast      ALPS, refitted exactly
balanced  the mask of ALPS refined by swaps with exact refits
thorough  then a tabu search beyond the local minimum
========  ===========================================================================

Every step starts at the mask of the step before and never raises the damped objective. So
the answer is never worse than that of ``alps``, and more effort is never worse. A fixed
mask is only refitted, and for columns the choice of ALPS is final.

References
----------
.. [1] X. Meng, K. Behdin, H. Wang, R. Mazumder, "ALPS: Improved Optimization for Highly
   Sparse One-Shot Pruning for Large Language Models", NeurIPS 2024, arXiv:2406.07831 (the
   mask to start from; :mod:`layerwise.solvers.swaps` names the sources of the search).

Notes
-----
Chosen by measurement on layers of the packaged models; see ``docs/choosing.md``.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch

from layerwise.patterns import NM, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.admm import ALPS
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.options import check_one_of
from layerwise.solvers.swaps import Swaps

Effort = Literal["fast", "balanced", "thorough"]
EFFORTS: tuple[str, ...] = get_args(Effort)

TABU_STEPS = 1000
NM_CANDIDATES = 32  # of the descent: only those in the same group can be exchanged


@dataclass(frozen=True)
class Best:
    """ALPS, swaps and an exact refit, as far as the effort allows.

    Cost: that of ``alps``, and some rounds O(out kept^2 candidates) of ``swaps``;
    memory O(kept^2) a row.

    Parameters
    ----------
    effort
        ``"fast"``, ``"balanced"`` or ``"thorough"``.
    memory_budget
        Bytes for the rows that are worked on together.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "certified refit, never worse than its parts"
    name: str = "best"
    effort: Effort = "balanced"
    memory_budget: int = LeastSquares.memory_budget

    def __post_init__(self) -> None:
        check_one_of(self, "effort", *EFFORTS)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Every pattern."""
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Choose a mask, refine it, refit it."""
        alps = ALPS(memory_budget=self.memory_budget)
        movable = isinstance(problem.pattern, Unstructured | NM)
        if self.effort == "fast" or not movable:
            return alps.solve(problem)
        mask = alps.find(problem)
        weight = torch.where(mask, problem.weight.to(problem.dtype), 0)
        count = NM_CANDIDATES if isinstance(problem.pattern, NM) else Swaps.candidates
        descent = Swaps(candidates=count, memory_budget=self.memory_budget)
        descended = descent.solve(
            problem, initial=Answer(weight, mask), on_iteration=on_iteration
        )
        if self.effort == "balanced":
            return descended
        search = Swaps(tabu=TABU_STEPS, memory_budget=self.memory_budget)
        better = search.solve(problem, initial=descended, on_iteration=on_iteration)
        return replace(
            better,
            iterations=descended.iterations + better.iterations,
            history=descended.history + better.history,
            stats={
                **better.stats,
                "swaps": descended.stats["swaps"] + better.stats["swaps"],
            },
        )

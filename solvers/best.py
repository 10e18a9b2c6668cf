r"""The recommended composition: mask by ALPS, exact exchanges, certified refit.

========  ===========================================================================
effort    steps
========  ===========================================================================
fast      the mask of ALPS, one pass of exchanges among the entries likely to change
balanced  then passes over more entries, while they gain; trades between rows if they
          share a budget
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

from layerwise.patterns import NM, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.admm import ALPS
from layerwise.solvers.descent import Descent, Pass
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.options import check_one_of
from layerwise.solvers.swaps import Swaps

Effort = Literal["fast", "balanced", "thorough"]
EFFORTS: tuple[str, ...] = get_args(Effort)

COARSE = Pass(candidates=32, tolerance=1e-3)
FINE = Pass(candidates=48, tolerance=1e-5)
FINE_PASSES = 4  # at most
ENOUGH = 1e-3  # share of the objective: a pass that gains less is the last one
TABU_STEPS = 1000


@dataclass(frozen=True)
class Best:
    """ALPS, exchanges and an exact refit, as far as the effort allows.

    Cost: that of ``alps``, and O(out kept^3 / 3) for each pass of the descent;
    ``"thorough"`` adds rounds O(out kept^2 candidates) of ``swaps``, with memory O(kept^2)
    a row.

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
        if not isinstance(problem.pattern, Unstructured | NM):
            return ALPS(memory_budget=self.memory_budget).solve(problem)
        start = ALPS(finish="cg").solve(problem)
        passes = (COARSE,) if self.effort == "fast" else (COARSE, *(FINE,) * FINE_PASSES)
        descent = Descent(passes, ENOUGH, memory_budget=self.memory_budget)
        descended = descent.solve(problem, initial=start, on_iteration=on_iteration)
        shared = getattr(problem.pattern, "group", "row") == "layer"
        if self.effort == "fast" or (self.effort == "balanced" and not shared):
            return descended
        tabu = TABU_STEPS if self.effort == "thorough" else 0
        search = Swaps(tabu=tabu, memory_budget=self.memory_budget)
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

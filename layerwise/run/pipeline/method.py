"""The method of a run, for any kind of removal."""

from dataclasses import dataclass, replace
from typing import Any

from layerwise.configure import options_of, with_warm_start
from layerwise.errors import UsageError
from layerwise.lower_bounds import MEMORY_BUDGET
from layerwise.run.pipeline.gradients import GradientStatistic, required_gradient
from layerwise.solve import steps_of
from layerwise.solver import Solver, requirements


@dataclass(frozen=True)
class Method:
    """A solver, with the damping and the certificates of its answers.

    Parameters
    ----------
    solver
        Configured solver.
    damping
        Ridge towards the dense weight, relative to the mean diagonal of the gram.
    certify
        Whether to prove the gap of every matrix; None: if the effort is thorough.
    memory_budget
        Bytes for the rows of these proofs.
    """

    solver: Solver
    damping: float = 0.01
    certify: bool | None = None
    memory_budget: int = MEMORY_BUDGET

    @property
    def name(self) -> str:
        """Name in logs and records."""
        return self.solver.name

    @property
    def statistics(self) -> frozenset[str]:
        """Statistics that the solver, or any step of a chain, reads."""
        return frozenset().union(*(requirements(step) for step in steps_of(self.solver)))

    @property
    def gradient(self) -> GradientStatistic | None:
        """Statistic of the gradients of the dense model, if the solver reads one."""
        return required_gradient(self.solver)

    @property
    def needs_whole_model(self) -> bool:
        """Whether the blocks cannot be loaded one by one: gradients need all of them."""
        return self.gradient is not None

    def recipe_fields(self) -> dict[str, Any]:
        """Fields of a recipe that describe this method."""
        return {
            "method": self.name,
            "damping": self.damping,
            "options": options_of(self.solver),
        }

    def with_certify(self, *, bounded: bool) -> "Method":
        """Return the method with `certify` resolved.

        Parameters
        ----------
        bounded
            Whether there are lower bounds for the pattern.

        Raises
        ------
        UsageError
            Certificates are requested, but the pattern has no lower bounds.
        """
        if self.certify and not bounded:
            message = (
                "certify bounds the best mask of 0.5 or n:m; the columns of a smaller "
                "model have no such bound: leave certify out"
            )
            raise UsageError(message)
        efforts = [getattr(step, "effort", None) for step in steps_of(self.solver)]
        by_default = bounded and "thorough" in efforts
        return replace(self, certify=by_default if self.certify is None else self.certify)

    def with_start(self, start: str) -> "Method":
        """Return the method; a ``fista-paper`` without a warm start gets this one."""
        return replace(self, solver=with_warm_start(self.solver, "fista-paper", start))

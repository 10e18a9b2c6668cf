"""The front door: check the problem, call the solver, verify, raise or return.

This module sits above the solvers, because it turns their names into objects. Nothing in
``solvers/`` imports it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from layerwise.chunks import all_finite
from layerwise.errors import InvalidProblemError, SolveError, UsageError
from layerwise.evaluate import check_feasible, evaluate
from layerwise.linalg import ieee_products
from layerwise.patterns import FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import Solution, Status
from layerwise.solver import OnIteration, Solver, requirements
from layerwise.solvers import get_solver

SCALED_FIGURES = ("objective", "penalty")  # figures of an iteration that grow with gram


@ieee_products()
def solve(
    problem: LayerProblem,
    solver: str | Solver | Any,
    *,
    initial: Solution | None = None,
    on_iteration: OnIteration | None = None,
    throw: bool = True,
) -> Solution:
    """Solve a layer problem with a solver, a name, or any object that has ``solve``.

    The problem is scaled by a power of two first, so grams of any magnitude are solved
    alike; the answer is verified and graded on the problem as posed. An answer with a
    `bias` is graded with the best bias for its weights, computed here.

    Parameters
    ----------
    problem
        The layer to prune.
    solver
        A name of :data:`layerwise.SOLVERS`, names joined by ``+``, a configured solver,
        or an object with ``solve(problem)`` that returns something with ``weight``.
    initial
        Starting point, for solvers that use one.
    on_iteration
        Called with the figures of every iteration or round.
    throw
        Whether a numerical failure raises :class:`SolveError`; otherwise it is returned.

    Raises
    ------
    UsageError
        If the name is unknown.
    InvalidProblemError
        If the solver does not handle the pattern, or `initial` has another shape.
    SolveError
        If arithmetic failed.
    VerificationError
        If the solver broke the pattern.
    """
    chosen = resolve(solver)
    refuse_unless_solvable(chosen, problem)
    if initial is not None:
        initial = _checked_start(problem, initial)
    scaled, exponent = problem.normalized()
    if isinstance(chosen, Solver):
        report = on_iteration and (lambda entry: on_iteration(_as_posed(entry, exponent)))
        found = chosen.solve(scaled, initial=initial, on_iteration=report)
    else:
        found = chosen.solve(scaled)
    weight = found.weight
    mask = getattr(found, "mask", None)
    if mask is None:
        mask = problem.pattern.mask(weight.abs().nan_to_num())
    failed = getattr(found, "status", Status.FEASIBLE) is Status.NUMERICAL_ERROR
    if not failed and all_finite(weight):
        check_feasible(problem, weight, mask)
    graded = evaluate(
        problem,
        weight,
        mask,
        getattr(found, "status", Status.FEASIBLE),
        with_bias=getattr(found, "bias", None) is not None,
        certificate=getattr(found, "certificate", None),
        iterations=getattr(found, "iterations", 0),
        history=tuple(
            _as_posed(entry, exponent) for entry in getattr(found, "history", ())
        ),
        stats=getattr(found, "stats", {}),
    )
    if throw and graded.status is Status.NUMERICAL_ERROR:
        message = (
            f"{solver_name(chosen)} failed numerically; raise the damping "
            f"(now {problem.damping:g}) or check the calibration activations"
        )
        raise SolveError(message)
    return graded


def _checked_start(problem: LayerProblem, initial: Solution) -> Solution:
    """Start of the right shape, without the graph of weights that need gradients."""
    for name in ("weight", "mask"):
        shape = tuple(getattr(initial, name).shape)
        if shape != problem.shape:
            message = f"initial has a {name} of shape {shape}, expected {problem.shape}"
            raise InvalidProblemError(message)
    return replace(initial, weight=initial.weight.detach())


def refuse_unless_solvable(solver: Solver | Any, problem: LayerProblem) -> None:
    """Raise :class:`InvalidProblemError` if the solver does not handle the pattern."""
    if not getattr(solver, "can_solve", lambda _: True)(problem):
        raise InvalidProblemError(_refusal(solver, problem))


@dataclass(frozen=True)
class Chain:
    """Solvers one after the other, each starting from the answer of the one before.

    A step that requires a mask is given ``FixedMask`` of the previous answer; every other
    step keeps the original pattern.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    steps: tuple[Solver | Any, ...]

    @property
    def name(self) -> str:
        """Names of the steps, joined by ``+``."""
        return "+".join(solver_name(step) for step in self.steps)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Whether the first step can, and no step needs a mask that is not there."""
        return bool(getattr(self.steps[0], "can_solve", lambda _: True)(problem))

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Solution | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Solution:
        """Run every step; the status and certificate are those of the last one."""
        current = initial
        for index, step in enumerate(self.steps):
            posed = problem
            if index and current is not None and "mask" in requirements(step):
                posed = problem.with_pattern(FixedMask(current.mask))
            current = solve(
                posed, step, initial=current, on_iteration=on_iteration, throw=False
            )
            if current.status is Status.NUMERICAL_ERROR:
                break
        assert current is not None
        refitted = len(self.steps) > 1 and current.status is Status.OPTIMAL
        if refitted and not isinstance(problem.pattern, FixedMask):
            # optimal on its mask, which a heuristic chose: feasible for the problem posed
            current = replace(current, status=Status.FEASIBLE)
        return current


def chain(*steps: str | Solver | Any) -> Chain:
    """Chain of solvers: ``chain("wanda", "least-squares")``."""
    if not steps:
        message = "a chain needs at least one solver"
        raise UsageError(message)
    return Chain(tuple(resolve(step) for step in steps))


def steps_of(solver: Solver | Any) -> Iterator[Solver | Any]:
    """Solvers that work one after the other, those of chains within chains too."""
    if isinstance(solver, Chain):
        for step in solver.steps:
            yield from steps_of(step)
    else:
        yield solver


def resolve(solver: str | Solver | Any) -> Solver | Any:
    """Solver object for a name, for names joined by ``+``, or for an object itself."""
    if not isinstance(solver, str):
        if not callable(getattr(solver, "solve", None)):
            message = f"{solver!r} is no solver: it has no solve(problem)"
            raise UsageError(message)
        return solver
    names = solver.split("+")
    return chain(*names) if len(names) > 1 else get_solver(solver)


def solver_name(solver: Solver | Any) -> str:
    """Name for messages and logs."""
    return str(getattr(solver, "name", type(solver).__name__))


def _as_posed(entry: Mapping[str, float], exponent: int) -> Mapping[str, float]:
    """Figures of an iteration on the scaled problem, in units of the problem as posed."""
    scale = 2.0**exponent
    return {
        name: value * scale if name in SCALED_FIGURES else value
        for name, value in entry.items()
    }


def _refusal(solver: Solver | Any, problem: LayerProblem) -> str:
    if isinstance(solver, Chain):
        solver = solver.steps[0]
    name = solver_name(solver)
    if "mask" in requirements(solver):
        return (
            f"{name} finds weights for a mask that is fixed: give it a FixedMask, or chain "
            f'it after a method that chooses one, as in "wanda+{name}"'
        )
    return f"{name} does not handle the pattern {problem.pattern}"

"""The entry point: check the problem, call the solver, verify, grade, raise or return.

This module imports the solvers, to find them by name. Nothing in ``solvers/`` imports it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.chunks import all_finite
from layerwise.errors import InvalidProblemError, SolveError, UsageError
from layerwise.evaluate import check_feasible, grade
from layerwise.foreign import UserSolver, answer_of
from layerwise.linalg import ieee_products
from layerwise.patterns import Columns, FixedMask
from layerwise.problem import LayerProblem, check_problem
from layerwise.solution import Answer, Solution, Start, Status, mask_of
from layerwise.solver import OnIteration, Solver, SolverLike, requirements
from layerwise.solvers import get_solver

SCALED_FIGURES = ("objective", "penalty")  # figures that are proportional to the gram


@ieee_products()
def solve(
    problem: LayerProblem,
    solver: SolverLike,
    *,
    initial: Start | None = None,
    on_iteration: OnIteration | None = None,
    throw: bool = True,
) -> Solution:
    """Solve a layer problem with a solver, a name, or any object that has ``solve``.

    The problem is first scaled by a power of two, so grams of any magnitude are solved
    alike. The answer is verified, and graded once, on the problem as posed. If the answer
    relies on a bias, it is graded with the best bias for its weights, computed here.

    Parameters
    ----------
    problem
        The layer to prune.
    solver
        A name of :data:`layerwise.SOLVERS`, names joined by ``+``, a configured solver,
        or an object with ``solve(problem)`` that returns the weight or something that has
        it as ``weight``.
    initial
        Starting point, for solvers that use one.
    on_iteration
        Called with the figures of every iteration or round.
    throw
        Whether a numerical failure raises :class:`SolveError`; otherwise it is returned.

    Raises
    ------
    UsageError
        If the name is unknown, or the object is not a solver or returns no weight.
    InvalidProblemError
        If the solver does not handle the pattern, `initial` has another shape, or the gram
        is indefinite.
    SolveError
        If arithmetic failed.
    VerificationError
        If the solver broke the pattern.
    """
    check_problem(problem)
    chosen = resolve(solver)
    refuse_unless_solvable(chosen, problem)
    start = None if initial is None else _checked_start(problem, initial)
    scaled, exponent = problem.normalized()
    report = on_iteration and (lambda entry: on_iteration(_as_posed(entry, exponent)))
    if problem.squares_leave_float32:
        scaled = replace(scaled, weight=scaled.weight.double())
    answer = _checked_answer(chosen, scaled, start, report)
    overflow = all_finite(answer.weight)
    if problem.squares_leave_float32:
        answer = _shortened(answer, problem.dtype)
    overflow = overflow and not all_finite(answer.weight)
    history = tuple(_as_posed(entry, exponent) for entry in answer.history)
    graded = grade(problem, replace(answer, history=history))
    if throw and graded.status is Status.NUMERICAL_ERROR:
        raise SolveError(_failure(chosen, problem, overflow))
    return graded


def _shortened(answer: Answer, dtype: torch.dtype) -> Answer:
    """Answer in a shorter type; infinite weights are a numerical error."""
    weight = answer.weight.to(dtype)
    status = answer.status if all_finite(weight) else Status.NUMERICAL_ERROR
    return replace(answer, weight=weight, status=status)


def _failure(solver: Solver, problem: LayerProblem, overflow: bool) -> str:
    if overflow:
        largest = float(problem.weight.double().abs().max())
        return (
            f"{solver.name}: the weights reach {largest:.1e} and the best ones overflow "
            f"float32: give the weight in float64, or multiply it by a power of two"
        )
    return (
        f"{solver.name} failed numerically; raise the damping "
        f"(now {problem.damping:g}) or check the calibration activations"
    )


def _checked_answer(
    solver: Solver,
    problem: LayerProblem,
    initial: Start | None,
    on_iteration: OnIteration | None,
) -> Answer:
    """Answer with its mask, either feasible or with the status of a numerical error."""
    answer = answer_of(solver.solve(problem, initial=initial, on_iteration=on_iteration))
    mask, status = mask_of(answer, problem.pattern), answer.status
    if not all_finite(answer.weight):
        status = Status.NUMERICAL_ERROR
    if status is not Status.NUMERICAL_ERROR:
        check_feasible(problem, answer.weight, mask)
    return replace(answer, mask=mask, status=status)


def _checked_start(problem: LayerProblem, initial: Start) -> Answer:
    """Start of the right shape, detached from any graph of gradients."""
    initial = answer_of(initial)
    for name, tensor in (("weight", initial.weight), ("mask", initial.mask)):
        if tensor is not None and tuple(tensor.shape) != problem.shape:
            shape = tuple(tensor.shape)
            message = f"initial has a {name} of shape {shape}, expected {problem.shape}"
            raise InvalidProblemError(message)
    return Answer(initial.weight, mask_of(initial, problem.pattern))


def refuse_unless_solvable(solver: Solver, problem: LayerProblem) -> None:
    """Raise :class:`InvalidProblemError` if the solver does not handle the pattern."""
    if not solver.can_solve(problem):
        raise InvalidProblemError(_refusal(solver, problem))


@dataclass(frozen=True)
class Chain:
    """Solvers one after the other, each starting from the answer of the one before.

    A step that requires a mask is posed with the ``FixedMask`` of the previous answer;
    every other step keeps the original pattern.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    steps: tuple[Solver, ...]

    @property
    def name(self) -> str:
        """Names of the steps, joined by ``+``."""
        return "+".join(step.name for step in self.steps)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Whether every step can solve the problem, after the step before it."""
        return self.unable(problem) is None

    def unable(self, problem: LayerProblem) -> Solver | None:
        """First step, of this chain or one inside it, that cannot solve its problem."""
        posed = problem
        for number, step in enumerate(self.steps):
            if number and "mask" in requirements(step):
                posed = problem.with_pattern(FixedMask(_a_mask(problem)))
            if not step.can_solve(posed):
                return (step.unable(posed) if isinstance(step, Chain) else None) or step
            posed = problem
        return None

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Run every step; the status and certificate are those of the last one.

        Answers between the steps are verified and not graded.
        """
        posed, answer = problem, None
        for step in self.steps:
            if answer is not None:
                initial, posed = _checked_start(problem, answer), problem
                if "mask" in requirements(step):
                    kept = mask_of(initial, problem.pattern)
                    posed = problem.with_pattern(FixedMask(kept))
            refuse_unless_solvable(step, posed)
            answer = _checked_answer(step, posed, initial, on_iteration)
            if answer.status is Status.NUMERICAL_ERROR:
                break
        assert answer is not None
        refitted = len(self.steps) > 1 and answer.status is Status.OPTIMAL
        if refitted and not isinstance(problem.pattern, FixedMask):
            # optimal on a mask that a heuristic chose: only feasible for the problem posed
            answer = replace(answer, status=Status.FEASIBLE)
        return answer


def chain(*steps: SolverLike) -> Chain:
    """Chain of solvers: ``chain("wanda", "least-squares")``."""
    if not steps:
        message = "a chain needs at least one solver"
        raise UsageError(message)
    return Chain(tuple(resolve(step) for step in steps))


def steps_of(solver: Solver) -> Iterator[Solver]:
    """Steps of a solver in order, including those of nested chains."""
    if isinstance(solver, Chain):
        for step in solver.steps:
            yield from steps_of(step)
    else:
        yield solver


def resolve(method: SolverLike) -> Solver:
    """Solver for a name, for names joined by ``+``, or for an object.

    A user's own object that is not a solver is wrapped by
    :class:`layerwise.foreign.UserSolver`, so the result is always a solver.
    """
    if not isinstance(method, str):
        if isinstance(method, Solver) and not isinstance(method, type):
            return method
        return UserSolver(method)
    names = method.split("+")
    return chain(*names) if len(names) > 1 else get_solver(method)


def _as_posed(entry: Mapping[str, float], exponent: int) -> Mapping[str, float]:
    """Figures of an iteration on the scaled problem, in units of the problem as posed."""
    scale = 2.0**exponent
    return {
        name: value * scale if name in SCALED_FIGURES else value
        for name, value in entry.items()
    }


def _a_mask(problem: LayerProblem) -> Tensor:
    """Mask of the kind that a step leaves: rows differ unless whole columns are removed."""
    kept = torch.ones(problem.shape, dtype=torch.bool, device=problem.weight.device)
    kept[:, 0] = not isinstance(problem.pattern, Columns)
    kept[0, 0] = False
    return kept


def _refusal(solver: Solver, problem: LayerProblem) -> str:
    if isinstance(solver, Chain):
        solver = solver.unable(problem) or solver
    name = solver.name
    if "mask" in requirements(solver):
        return (
            f"{name} finds weights for a fixed mask: give it a FixedMask, or chain it "
            f'after a method that chooses one, as in "wanda+{name}"'
        )
    return (
        f"{name} does not handle the pattern {problem.pattern}: choose another method or "
        f"pattern"
    )

"""Solvers with hyper-parameters from text: options by name, budgets, warm starts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from layerwise.errors import UsageError, quoted
from layerwise.foreign import UserSolver
from layerwise.limits import check_limit
from layerwise.solve import Chain, resolve
from layerwise.solver import Solver, SolverLike

OptionValue = bool | int | float | str


def configure(method: SolverLike, options: Mapping[str, OptionValue]) -> Solver:
    """Solver for a method name, a chain of names or an object, with options applied.

    Parameters
    ----------
    method
        A name, names joined by ``+``, or a solver.
    options
        Hyper-parameters by field name; in a chain ``step.field`` addresses one step.

    Raises
    ------
    UsageError
        If a name is unknown or a value has the wrong type.
    """
    solver = resolve(method)
    for name, value in options.items():
        step, _, field = name.rpartition(".")
        solver, hits = _apply(solver, step, field, value)
        if not hits:
            known = ", ".join(_fields(solver)) or "none"
            message = f"{solver.name} has no option {name!r}; it has: {known}"
            raise UsageError(message)
    return solver


def takes_option(method: SolverLike, name: str) -> bool:
    """Whether :func:`configure` could apply an option of this name to a method."""
    solver = resolve(method)
    if isinstance(solver, Chain):
        return any(takes_option(step, name) for step in solver.steps)
    step, _, field = name.rpartition(".")
    return step in ("", solver.name) and field in _fields(solver)


def with_memory_budget(solver: Solver, budget: int) -> Solver:
    """Give the budget to every step that has an option `memory_budget`."""
    check_limit("memory_budget", budget)
    return _apply(solver, "", "memory_budget", budget)[0]


def with_warm_start(solver: Solver, method: str, start: str) -> Solver:
    """Set the warm start of the steps named `method` whose own is None."""
    if isinstance(solver, Chain):
        steps = tuple(with_warm_start(step, method, start) for step in solver.steps)
        return dataclasses.replace(solver, steps=steps)
    is_open = solver.name == method and getattr(solver, "warm_start", "") is None
    return _apply(solver, "", "warm_start", start)[0] if is_open else solver


def options_of(solver: Solver) -> dict[str, OptionValue]:
    """Options that differ from the solver's defaults, as :func:`configure` takes them."""
    if isinstance(solver, Chain):
        return {
            f"{part.name}.{name}": value
            for part in solver.steps
            for name, value in options_of(part).items()
        }
    try:
        default = resolve(solver.name)
    except UsageError:  # a user's own solver: list all simple values
        default = None
    return {
        name: getattr(solver, name)
        for name in _fields(solver)
        if getattr(solver, name) != getattr(default, name, None)
        and isinstance(getattr(solver, name), OptionValue)
    }


def _apply(solver: Solver, step: str, field: str, value: OptionValue) -> tuple[Solver, int]:
    if isinstance(solver, Chain):
        results = [_apply(part, step, field, value) for part in solver.steps]
        steps = tuple(part for part, _ in results)
        return dataclasses.replace(solver, steps=steps), sum(hits for _, hits in results)
    if not takes_option(solver, f"{step}.{field}" if step else field):
        return solver, 0
    owner = _owner(solver)
    changed = dataclasses.replace(owner, **{field: _checked(solver, field, value)})
    return resolve(changed), 1


def _owner(solver: Solver) -> Any:
    """Return the object whose fields are the options."""
    return solver.own if isinstance(solver, UserSolver) else solver


def _checked(solver: Solver, field: str, value: OptionValue) -> Any:
    """Value converted to the type of the field; YAML reads ``1e-4`` as text."""
    hint = get_type_hints(type(_owner(solver)))[field]
    try:
        if isinstance(value, bool) and hint is not bool:
            message = (
                f"option {field} of {solver.name} is not a switch, got {quoted(value)}"
            )
            raise UsageError(message)
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        message = f"option {field} of {solver.name}: {reason}, got {quoted(value)}"
        raise UsageError(message) from None


def _fields(solver: Solver) -> list[str]:
    if isinstance(solver, Chain):
        return [f"{part.name}.{name}" for part in solver.steps for name in _fields(part)]
    owner = _owner(solver)
    if not dataclasses.is_dataclass(owner):
        return []
    return [field.name for field in dataclasses.fields(owner) if field.name != "name"]

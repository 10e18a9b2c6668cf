"""The list of ``layerwise solvers``, read from the solvers themselves."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from layerwise.moments import Moments
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solver import Solver, requirements
from layerwise.solvers import SOLVERS

PATTERNS: Mapping[str, Pattern] = {
    "unstructured": Unstructured(0.5),
    "n:m": NM(2, 4),
    "columns": Columns(2),
    "fixed mask": FixedMask(torch.ones(1, 4, dtype=torch.bool)),
}


@dataclass(frozen=True)
class Entry:
    """One line of the list."""

    name: str
    patterns: str
    needs: str
    guarantee: str
    summary: str


def catalogue() -> list[Entry]:
    """Every solver by name, with the patterns that its `can_solve` accepts."""
    return [_entry(name, make) for name, make in SOLVERS.items()]


def _entry(name: str, make: Callable[[], Solver]) -> Entry:
    solver = make()
    moments = Moments(torch.eye(4, dtype=torch.float64))
    handled = [
        label
        for label, pattern in PATTERNS.items()
        if solver.can_solve(
            LayerProblem.from_moments(torch.ones(1, 4), moments, pattern=pattern)
        )
    ]
    return Entry(
        name=name,
        patterns="any" if len(handled) == len(PATTERNS) else ", ".join(handled),
        needs=", ".join(sorted(requirements(solver))) or "nothing",
        guarantee=getattr(solver, "guarantee", "none"),
        summary=_summary(make),
    )


def _summary(make: Callable[[], Solver]) -> str:
    """First docstring line: of the file if it has one solver class, else of the object."""
    documented: object = make
    classes = [other for other in SOLVERS.values() if inspect.isclass(other)]
    if sum(other.__module__ == make.__module__ for other in classes) == 1:
        documented = make if inspect.isfunction(make) else inspect.getmodule(make)
    return (inspect.getdoc(documented) or "").split("\n")[0]

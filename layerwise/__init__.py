"""layerwise: numerical optimization for layer-wise reconstruction of pruned networks.

Researchers build a :class:`LayerProblem` and :func:`solve` it. Practitioners call
:func:`prune_model` and :func:`load` the folder that it wrote. :class:`Adapprox` is an
optimizer to train pruned models. Importing this package loads torch and nothing heavier.
"""

from typing import TYPE_CHECKING, Any

import layerwise.first_line  # noqa: F401 - before torch
from layerwise.accumulator import MomentAccumulator
from layerwise.errors import (
    DataError,
    Interrupted,
    InvalidProblemError,
    LayerwiseError,
    MemoryBudgetError,
    SolveError,
    UnsupportedModelError,
    UsageError,
    VerificationError,
    WorkerError,
)
from layerwise.lower_bounds import lower_bounds, proven_gap
from layerwise.moments import Moments
from layerwise.patterns import NM, Columns, FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Certificate, Solution, Status
from layerwise.solve import chain, solve
from layerwise.solver import Solver
from layerwise.solvers import SOLVERS
from layerwise.solvers.adapprox import Adapprox

if TYPE_CHECKING:
    from layerwise.recovery.retrain import retrain_model
    from layerwise.run.models.opening import load
    from layerwise.run.prune import prune_model

__version__ = "0.1.0"

__all__ = [
    "NM",
    "SOLVERS",
    "Adapprox",
    "Answer",
    "Certificate",
    "Columns",
    "DataError",
    "FixedMask",
    "Interrupted",
    "InvalidProblemError",
    "LayerProblem",
    "LayerwiseError",
    "MemoryBudgetError",
    "MomentAccumulator",
    "Moments",
    "Solution",
    "SolveError",
    "Solver",
    "Status",
    "Unstructured",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
    "WorkerError",
    "chain",
    "load",
    "lower_bounds",
    "proven_gap",
    "prune_model",
    "retrain_model",
    "solve",
]


def __getattr__(name: str) -> Any:
    if name == "load":  # imports transformers, so only on first use
        from layerwise.run.models.opening import load

        return load
    if name == "prune_model":  # the same
        from layerwise.run.prune import prune_model

        return prune_model
    if name == "retrain_model":
        from layerwise.recovery.retrain import retrain_model

        return retrain_model
    message = f"module 'layerwise' has no attribute {name!r}"
    raise AttributeError(message)

"""Settings of a structured run: which channels are removed, how many, and the format.

Sparsity is the fraction of the parameters of the decoder blocks that is removed. If a
format cannot represent fewer channels of a kind, those are kept and others are pruned more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from layerwise.errors import UsageError
from layerwise.limits import check_limit
from layerwise.moments import Moments
from layerwise.patterns import Columns, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.run.models.stock import OUTPUT_FORMATS, OutputFormat
from layerwise.run.pipeline.removal import Amount
from layerwise.solve import steps_of
from layerwise.solver import Solver

Kind = Literal["columns", "heads"]
KINDS: tuple[str, ...] = get_args(Kind)
COUPLINGS: Mapping[Kind, tuple[str, ...]] = {
    "columns": ("mlp", "values", "inner"),
    "heads": ("mlp", "heads", "inner"),
}
PUBLISHED_KINDS: Mapping[str, Kind] = {"flap": "heads"}

DEFAULT_MULTIPLE = 8  # kernels are faster at such widths
OPTIONS = ("allocation", "format", "multiple")


@dataclass(frozen=True)
class Structure:
    """Which channels are removed, in place of a pattern for single weights.

    Parameters
    ----------
    kind
        ``"columns"``: channels of the MLP and of the values of attention, or the inner
        channels of a state space model. ``"heads"``: channels of the MLP and whole heads
        of keys and values with their query heads.
    sparsity
        Fraction of the parameters of the decoder blocks to remove, in (0, 1).
    allocation
        Rule that spreads it over the layers, see :mod:`layerwise.run.channels.widths`;
        None: the default of the method.
    format
        ``"stock"``: transformers alone opens the result, so all blocks are alike.
        ``"native"``: :func:`layerwise.load` opens it, and blocks differ. ``"padded"``:
        blocks differ, but are padded with zeros to the widest, for stock transformers.
    multiple
        Number that must divide the widths of the MLP, of inner channels and of the values
        of a head.
    """

    kind: Kind
    sparsity: float
    allocation: str | None = None
    format: OutputFormat = "stock"
    multiple: int = DEFAULT_MULTIPLE

    def __post_init__(self) -> None:
        if not 0 < self.sparsity < 1:
            message = (
                f"the sparsity of a structured run must lie in (0, 1), got "
                f"{self.sparsity:g}: give the fraction of the block parameters to remove"
            )
            raise UsageError(message)
        if self.format not in OUTPUT_FORMATS:
            known = ", ".join(OUTPUT_FORMATS)
            message = f"format is one of {known}, got {self.format!r}"
            raise UsageError(message)
        if self.multiple < 1:
            message = f"multiple must be at least 1, got {self.multiple}"
            raise UsageError(message)
        check_limit("multiple", self.multiple)

    def __str__(self) -> str:
        return f"{self.kind}, {self.sparsity:g} of the blocks"


def choose_structure(solver: Solver, amount: Amount) -> Structure | None:
    """Structure described by the arguments; None if they do not mean channels.

    Raises
    ------
    UsageError
        If the arguments contradict each other.
    """
    kind = amount.pattern if amount.pattern in KINDS else None
    if kind is None and amount.pattern is None and prunes_columns_only(solver):
        kind = PUBLISHED_KINDS.get(solver.name, "columns")
    if kind is None:
        return None
    options = {name: getattr(amount, name) for name in amount.given(*OPTIONS)}
    return Structure(kind, _fraction(amount.sparsity), **options)


def prunes_columns_only(solver: Solver) -> bool:
    """Whether a method removes whole columns; one that begins with zeros does not."""
    first = next(steps_of(solver))
    return removes_columns(solver) and not _solves(first, Unstructured(0.5))


def removes_columns(solver: Solver) -> bool:
    """Whether a method handles whole columns."""
    return _solves(solver, Columns(2))


def _solves(solver: Solver, pattern: Pattern) -> bool:
    """Whether a method handles a pattern, on a tiny problem."""
    moments = Moments(torch.eye(4, dtype=torch.float64))
    problem = LayerProblem.from_moments(torch.ones(1, 4), moments, pattern=pattern)
    return solver.can_solve(problem)


def _fraction(sparsity: Any) -> float:
    try:
        return float(sparsity)
    except (TypeError, ValueError):
        message = (
            f"a structured run takes a fraction of the parameters, such as 0.3, got "
            f"sparsity {sparsity!r}"
        )
        raise UsageError(message) from None

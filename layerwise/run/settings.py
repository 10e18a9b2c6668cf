"""Arguments of a run, turned into objects or refused before any work is done."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from layerwise.configure import OptionValue, configure, with_memory_budget, with_warm_start
from layerwise.errors import UsageError
from layerwise.lower_bounds import MEMORY_BUDGET
from layerwise.moments import Moments
from layerwise.patterns import (
    NM,
    Columns,
    FixedMask,
    Pattern,
    Unstructured,
    parse_pattern,
)
from layerwise.problem import LayerProblem
from layerwise.run.channels.structure import Structure
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from layerwise.solve import refuse_unless_solvable, steps_of

ROUNDING = 1e-9  # of a sparsity such as 1 - 2 / 5
# FISTAPruner starts from SparseGPT on OPT and from Wanda on every LLaMA
PUBLISHED_STARTS = {"opt": "sparsegpt"}
LONGEST_DEFAULT = 2048  # of sequence_length; contexts of 131072 tokens fit nowhere


def choose_pattern(sparsity: float | str | None, pattern: Pattern | str | None) -> Pattern:
    """One pattern from the two arguments that can give it; a conflict is an error."""
    if isinstance(pattern, str):
        pattern = parse_pattern(pattern)
    if not isinstance(pattern, Pattern | None):
        message = f'pattern is "n:m" or a Pattern, got {pattern!r}; or give sparsity'
        raise UsageError(message)
    if sparsity is None:
        if pattern is None:
            message = 'say how much to prune: sparsity=0.5, or "2:4" (keeps 2 of every 4)'
            raise UsageError(message)
        return pattern
    asked = parse_pattern(str(sparsity))
    if pattern is None:
        return asked
    if isinstance(asked, NM):
        agree = asked == pattern
    else:
        difference = getattr(asked, "sparsity", 0) - getattr(pattern, "sparsity", -1)
        agree = abs(difference) < ROUNDING
    if not agree:
        message = f"sparsity {asked} contradicts the pattern {pattern}; give one of them"
        raise UsageError(message)
    return pattern


def choose_solver(
    method: Any,
    pattern: Pattern | Structure,
    damping: float,
    options: Mapping[str, OptionValue] | None,
    memory_budget: int | None,
) -> Any:
    """Configured solver; refused if it cannot handle the pattern of a tiny problem."""
    solver = configure(method, options or {})
    if memory_budget is not None:
        solver = with_memory_budget(solver, memory_budget)
    if isinstance(pattern, NM | Unstructured):
        width = pattern.m if isinstance(pattern, NM) else 4
        moments = Moments(torch.eye(width, dtype=torch.float64))
        weight = torch.ones(1, width)
        refuse_unless_solvable(
            solver,
            LayerProblem.from_moments(weight, moments, pattern=pattern, damping=damping),
        )
    return solver


def choose_certify(asked: bool | None, solver: Any, pattern: Pattern | Structure) -> bool:
    """Whether to prove gaps: as asked, or where the effort is thorough."""
    bounded = isinstance(pattern, NM | Unstructured | FixedMask)
    if asked is None:
        efforts = [getattr(step, "effort", None) for step in steps_of(solver)]
        return bounded and "thorough" in efforts
    if asked and not bounded:
        message = (
            "certify bounds the best mask of 0.5 or n:m; the columns of a smaller model "
            "have no such bound: leave certify out"
        )
        raise UsageError(message)
    return asked


def budget_of_bounds(memory_budget: int | None) -> int:
    """Bytes for the rows of lower bounds."""
    return MEMORY_BUDGET if memory_budget is None else memory_budget


def with_published_start(
    solver: Any, model: nn.Module, pattern: Pattern | Structure
) -> Any:
    """Give ``fista-paper`` the warm start of the paper, unless one was chosen.

    SparseGPT prunes no columns, so there the start is Wanda's for every model.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    return with_start_of_family(solver, model_type, pattern)


def with_start_of_family(solver: Any, model_type: str, pattern: Pattern | Structure) -> Any:
    """Give ``fista-paper`` the warm start that the paper has for a family of models."""
    start = PUBLISHED_STARTS.get(model_type, "wanda")
    if isinstance(pattern, Columns | Structure):
        start = "wanda"
    return with_warm_start(solver, "fista-paper", start)


def check_error_correction(value: str) -> None:
    """Refuse an unknown mode."""
    if value not in ERROR_CORRECTIONS:
        message = (
            f"error_correction is one of {', '.join(ERROR_CORRECTIONS)}, got {value!r}"
        )
        raise UsageError(message)


def check_storable(pattern: Pattern | Structure) -> None:
    """Refuse a pattern that no recipe or manifest can name."""
    if not isinstance(pattern, NM | Unstructured | Structure):
        message = (
            f"the pattern {pattern} cannot be written to a folder; prune without "
            f"output_dir and save the model yourself"
        )
        raise UsageError(message)


def as_entries(value: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def choose_sequence_length(model: nn.Module, asked: int | None) -> int:
    """Length asked for, or the model's own, at most 2048."""
    longest = getattr(model.config, "max_position_embeddings", None)
    if asked is None:
        return min(LONGEST_DEFAULT, longest or LONGEST_DEFAULT)
    if longest is not None and asked > longest:
        message = f"sequence_length {asked} exceeds the {longest} positions of the model"
        raise UsageError(message)
    return asked


def choose_device(device: str | torch.device) -> torch.device:
    """Device by name; ``auto`` is a GPU if there is one. A device must be there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        message = f"device {str(device)!r} cannot be used: {reason}; try auto or cpu"
        raise UsageError(message) from None
    return chosen

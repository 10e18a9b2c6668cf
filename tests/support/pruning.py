"""Short runs of `prune_model`, and the problems that they pose."""

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from layerwise.problem import LayerProblem
from layerwise.run.pipeline import matrix
from layerwise.run.prune import prune_model
from layerwise.run.report import PruneReport
from layerwise.solve import solve
from tests.support.models import random_tokens

CALIBRATION = random_tokens(4, 12)


def prune(
    model: Any,
    method: Any = "wanda",
    sparsity: Any = 0.5,
    *,
    calibration: Tensor = CALIBRATION,
    **options: Any,
) -> PruneReport:
    """Prune in place with few tokens, shape (sequences, length)."""
    sequences, length = calibration.shape
    return prune_model(
        model,
        method,
        sparsity,
        calibration=calibration,
        n_sequences=sequences,
        sequence_length=length,
        **options,
    )


def prune_and_record(
    monkeypatch: pytest.MonkeyPatch, model: Any, **options: Any
) -> tuple[PruneReport, dict[str, LayerProblem]]:
    """Prune in place; the report, and the problems that were posed, by layer."""
    posed: list[LayerProblem] = []

    def recording(problem: LayerProblem, solver: Any) -> Any:
        posed.append(replace(problem, weight=problem.weight.clone()))
        return solve(problem, solver)

    monkeypatch.setattr(matrix, "solve", recording)
    report = prune(model, **options)
    names = [record.name for record in report.records]
    return report, dict(zip(names, posed, strict=True))

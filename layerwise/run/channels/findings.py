"""Findings of a survey, one block at a time, which a resumed run reads again."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from layerwise.run.pipeline.store import States

SCORES, ERRORS = "scores.", "errors."


@dataclass(frozen=True, eq=False)
class Finding:
    """Findings about one site before anything is removed.

    Parameters
    ----------
    scores
        Scores of all columns of the main consumer by the method, shape (in,).
    errors
        Objective after the removal of 0, 1, ... units of every head; None without curves.
    gain
        Growth of the mean loss of a token without `probed` units of every head.
    probed
        Number of units per head that were removed to measure the gain.
    """

    scores: Tensor
    errors: Tensor | None = None
    gain: float = 0.0
    probed: int = 0


def read_findings(states: States, index: int) -> dict[str, Finding] | None:
    """Return the findings of a block by the name of the site, or None if there are none."""
    state = states.read_state(_name(index))
    if state is None:
        return None
    tensors, text = state
    return {
        site: Finding(tensors[SCORES + site], tensors.get(ERRORS + site), **numbers)
        for site, numbers in json.loads(text).items()
    }


def write_findings(states: States, index: int, findings: Mapping[str, Finding]) -> None:
    """Keep the findings of a block, by the name of the site."""
    tensors = {SCORES + site: finding.scores for site, finding in findings.items()}
    for site, finding in findings.items():
        if finding.errors is not None:
            tensors[ERRORS + site] = finding.errors
    numbers = {
        site: {"gain": finding.gain, "probed": finding.probed}
        for site, finding in findings.items()
    }
    states.write_state(_name(index), tensors, json.dumps(numbers))


def _name(index: int) -> str:
    return f"survey-{index:05d}"

"""The record of a retrained unit."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from layerwise.errors import DataError, one_line


@dataclass(frozen=True)
class UnitRecord:
    """Figures of a unit: parameters that were retrained together.

    Parameters
    ----------
    name
        Full name of the block, part or matrix; empty for a whole model.
    trained
        Number of trained parameters.
    before, after
        Relative error of the outputs on the held-out batches, ``||F - Fhat|| / ||F||``; for
        the objective ``tokens``, the mean loss per token.
    learning_rate
        The best learning rate; None: none improved the unit, and nothing was changed.
    steps
        Updates per learning rate.
    losses
        Training losses of the last learning rate.
    seconds
        Wall time.
    """

    name: str
    trained: int
    before: float
    after: float
    learning_rate: float | None
    steps: int
    losses: tuple[float, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "UnitRecord":
        """Record from the values of :meth:`to_dict`."""
        names = {entry.name for entry in fields(cls)}
        if not isinstance(values, dict) or set(values) != names or not _is_sound(values):
            message = (
                "a record of a retrained unit has unknown, missing or impossible fields, "
                "so the file is damaged: start over with --no-resume (resume=False)"
            )
            raise DataError(message)
        return cls(**{**values, "losses": tuple(values["losses"])})


def unit_records(text: str) -> list[UnitRecord]:
    """Records from the JSON text of a list of them."""
    try:
        return [UnitRecord.from_dict(values) for values in json.loads(text)]
    except (RecursionError, TypeError, ValueError) as error:
        message = (
            f"the records of a retrained block are damaged ({one_line(error)}): start over "
            f"with --no-resume (resume=False)"
        )
        raise DataError(message) from error


def _is_sound(values: dict[str, Any]) -> bool:
    """Whether every field has its type."""
    rate, losses = values["learning_rate"], values["losses"]
    numbers = [values["before"], values["after"], values["seconds"]]
    return (
        isinstance(values["name"], str)
        and all(type(values[name]) is int for name in ("trained", "steps"))
        and isinstance(losses, list)
        and all(type(n) in (int, float) for n in (*numbers, *losses))
        and (rate is None or type(rate) in (int, float))
    )

"""The record of a retrained unit."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from layerwise.errors import DataError


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
        if not isinstance(values, dict) or set(values) != names:
            message = (
                "a record of a retrained unit has unknown or missing fields, so the file "
                "is damaged: start over"
            )
            raise DataError(message)
        return cls(**{**values, "losses": tuple(values["losses"])})

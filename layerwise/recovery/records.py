"""Figures of what was retrained."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from layerwise.errors import DataError


@dataclass(frozen=True)
class UnitRecord:
    """Figures of what was retrained together.

    Parameters
    ----------
    name
        Full name of the block, part or matrix; empty for a whole model.
    trained
        Numbers that were trained.
    before, after
        On what is held out: relative error of the outputs, ``||F - Fhat|| / ||F||``, or
        the mean loss of a token for the objective ``tokens``.
    learning_rate
        The one that was kept; None: none made it better, and nothing was changed.
    steps
        Updates with it.
    losses
        Training losses of the last learning rate that was tried.
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
            message = "a record of a retrained unit has other fields: the file is damaged"
            raise DataError(message)
        return cls(**{**values, "losses": tuple(values["losses"])})

"""Figures of a pruned matrix: one line of ``layers.jsonl``."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class LayerRecord:
    """Figures of one pruned matrix.

    Parameters
    ----------
    name
        Full name of the linear module.
    shape
        (out, in).
    method, pattern
        The method, and the pattern that the matrix satisfies.
    sparsity
        Fraction of zeros of the stored weight.
    relative_error
        ``||W X - What Xhat||_F / ||W X||_F``, after the cast to the type of the model.
    status
        Outcome of the solver.
    certificate, certificate_kind
        Proven bound and its kind, or None; for the answer before the cast.
    damping, damping_raised
        The damping that was used, and whether it is above the given one.
    rank, dead_channels, n_tokens
        Rank of the gram, number of inputs that are always zero, number of tokens.
    iterations, seconds
        Iterations and time of the solver.
    proven_gap
        Share of the damped objective of the stored weights that any other mask and weights
        could save at most, see :func:`layerwise.proven_gap`; None without certificates.
    """

    name: str
    shape: tuple[int, int]
    method: str
    pattern: str
    sparsity: float
    relative_error: float
    status: str
    certificate: float | None
    certificate_kind: str | None
    damping: float
    damping_raised: bool
    rank: int
    dead_channels: int
    n_tokens: int
    iterations: int
    seconds: float
    proven_gap: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerRecord":
        """Inverse of :meth:`to_dict`."""
        return cls(**{**values, "shape": tuple(values["shape"])})


def median_gap(records: Iterable[LayerRecord]) -> float | None:
    """Median proven gap of the matrices that have one."""
    gaps = [record.proven_gap for record in records if record.proven_gap is not None]
    return median(gaps) if gaps else None


def in_percent(gap: float) -> str:
    """A proven gap in percent, rounded up, so that the printed number is proven as well."""
    return f"{math.ceil(1000 * gap) / 10:.1f} %"

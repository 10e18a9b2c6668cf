"""What is known about a pruned layer: one line of ``layers.jsonl``."""

from dataclasses import asdict, dataclass
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
        What was asked for.
    sparsity
        Fraction of zeros of the stored weight.
    relative_error
        ``||W X - What Xhat||_F / ||W X||_F``, after the cast to the model's dtype.
    status
        Outcome of the solver.
    certificate, certificate_kind
        Proven bound and what it bounds, or None.
    damping
        The damping that was used, and `damping_raised` whether more than was asked for.
    rank, dead_channels, n_tokens
        Of the inputs: rank of their gram, channels that are always zero, tokens seen.
    iterations, seconds
        Of the solver.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LayerRecord":
        """Inverse of :meth:`to_dict`."""
        return cls(**{**values, "shape": tuple(values["shape"])})

"""Figures of a pruned matrix: one line of ``layers.jsonl``."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from statistics import median
from typing import Any

from layerwise.errors import DataError
from layerwise.run.checkpoints.strict_json import parse_json


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
    def from_dict(cls, values: Any) -> "LayerRecord":
        """Inverse of :meth:`to_dict`, for values from a file.

        Raises
        ------
        DataError
            A figure is missing, has another type, or is impossible; the message names it.
        """
        if not isinstance(values, dict):
            message = f"a record is an object with figures, not a {type(values).__name__}"
            raise DataError(message)
        optional = {field.name for field in fields(cls) if field.default is not MISSING}
        for name in sorted(KINDS.keys() ^ values.keys()):
            if name not in optional or name in values:
                how = "unknown" if name in values else "missing"
                message = f"the figure {name!r} is {how}"
                raise DataError(message)
        for name, value in values.items():
            if not KINDS[name](value):
                message = f"the figure {name!r} is {repr(value)[:40]}, which is impossible"
                raise DataError(message)
        return cls(**{**values, "shape": tuple(values["shape"])})


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and not math.isnan(value)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_finite(value: Any) -> bool:
    return _is_amount(value) and value < math.inf


def _is_share(value: Any) -> bool:
    return _is_amount(value) and value <= 1


def _is_shape(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2
    return pair and all(_is_count(size) and size > 0 for size in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _or_none(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


KINDS: Mapping[str, Callable[[Any], bool]] = {  # what every figure of a file can be
    "name": _is_text,
    "shape": _is_shape,
    "method": _is_text,
    "pattern": _is_text,
    "sparsity": _is_share,
    "relative_error": _is_amount,
    "status": _is_text,
    "certificate": _or_none(_is_number),
    "certificate_kind": _or_none(_is_text),
    "damping": _is_finite,
    "damping_raised": lambda value: isinstance(value, bool),
    "rank": _is_count,
    "dead_channels": _is_count,
    "n_tokens": _is_count,
    "iterations": _is_count,
    "seconds": _is_finite,
    "proven_gap": _or_none(_is_share),
}


def record_lines(records: Iterable[LayerRecord]) -> str:
    """Records as text: one line of JSON for each."""
    return "".join(json.dumps(record.to_dict()) + "\n" for record in records)


def read_records(data: bytes) -> list[LayerRecord]:
    """Inverse of :func:`record_lines`.

    Raises
    ------
    DataError
        A line is not JSON, or not a record; the message has its number.
    """
    records = []
    for number, line in enumerate(data.splitlines(), start=1):
        values = parse_json(line, f"line {number}")
        try:
            records.append(LayerRecord.from_dict(values))
        except DataError as error:
            message = f"line {number}: {error}"
            raise DataError(message) from error
    return records


def median_gap(records: Iterable[LayerRecord]) -> float | None:
    """Median proven gap of the matrices that have one."""
    gaps = [record.proven_gap for record in records if record.proven_gap is not None]
    return median(gaps) if gaps else None


def in_percent(gap: float) -> str:
    """A proven gap in percent, rounded up, so that the printed number is proven as well."""
    return f"{math.ceil(1000 * gap) / 10:.1f} %"

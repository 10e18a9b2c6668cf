"""Figures of many methods and patterns on the same layers."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.pipeline.records import LayerRecord, median_gap


@dataclass(frozen=True)
class SweepRow:
    """Summary of all layers by one method at one pattern.

    Parameters
    ----------
    method, pattern
        The method and the pattern.
    n_layers
        Number of layers.
    sparsity
        Fraction of zeros over all of them.
    mean_relative_error, median_relative_error
        Mean and median over the layers.
    seconds
        Sum over the layers, without reading files.
    median_proven_gap
        Median over the layers; None without certificates.
    """

    method: str
    pattern: str
    n_layers: int
    sparsity: float
    mean_relative_error: float
    median_relative_error: float
    seconds: float
    median_proven_gap: float | None


@dataclass(frozen=True)
class Sweep:
    """Records of every layer, method and pattern.

    Parameters
    ----------
    grams
        The gram folder.
    damping, device, threads
        Other settings that decide the figures.
    records
        Records by method, then pattern, then layer, each in the order of the arguments.
    seconds
        Wall time.
    output_dir
        Where the pruned weights were written, or None.
    """

    grams: Path
    damping: float
    device: str
    threads: int
    records: tuple[LayerRecord, ...]
    seconds: float
    output_dir: Path | None = None

    def rows(self) -> list[SweepRow]:
        """One row per method and pattern."""
        groups: dict[tuple[str, str], list[LayerRecord]] = {}
        for record in self.records:
            groups.setdefault((record.method, record.pattern), []).append(record)
        return [_row(method, pattern, part) for (method, pattern), part in groups.items()]

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        content: dict[str, Any] = {
            "grams": str(self.grams),
            "damping": self.damping,
            "device": self.device,
            "threads": self.threads,
            "seconds": self.seconds,
            "summary": [asdict(row) for row in self.rows()],
            "records": [record.to_dict() for record in self.records],
        }
        atomic_write(path, (json.dumps(content, indent=1) + "\n").encode())


def _row(method: str, pattern: str, records: Sequence[LayerRecord]) -> SweepRow:
    sizes = [record.shape[0] * record.shape[1] for record in records]
    zeros = [size * r.sparsity for size, r in zip(sizes, records, strict=True)]
    errors = [record.relative_error for record in records]
    return SweepRow(
        method=method,
        pattern=pattern,
        n_layers=len(records),
        sparsity=sum(zeros) / sum(sizes),
        mean_relative_error=fmean(errors),
        median_relative_error=median(errors),
        seconds=sum(record.seconds for record in records),
        median_proven_gap=median_gap(records),
    )

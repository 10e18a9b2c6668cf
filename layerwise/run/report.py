"""What a run tells while it goes on, and what it returns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model
from layerwise.run.pipeline.records import LayerRecord, median_gap


class Callback(Protocol):
    """Told about a run as it happens; every method is optional in effect.

    One that has a method ``on_note(text)`` is told what a reader of the log should know.
    """

    def on_start(self, n_layers: int) -> None:
        """Everything was checked; `n_layers` matrices will be pruned."""

    def on_layer(self, record: LayerRecord) -> None:
        """One matrix is done (or was done by the run that is resumed)."""

    def on_finish(self, report: "PruneReport") -> None:
        """All of it is done and saved."""


@dataclass(frozen=True, eq=False)
class PruneReport:
    """What a run did.

    Parameters
    ----------
    records
        Figures of every pruned matrix, in order.
    masks
        Mask of every pruned weight, by parameter name and in its shape, True = kept; read
        from `output_dir` when asked for, if there is one.
    output_dir
        Where it was saved, or None.
    seconds
        Wall time of the run.
    parameters_left
        Fraction of the parameters of the decoder blocks that is still there; 1 unless
        channels left.
    opened
        The pruned model, if it was in memory.
    """

    records: tuple[LayerRecord, ...]
    masks: Mapping[str, Tensor]
    output_dir: Path | None
    seconds: float
    parameters_left: float = 1.0
    opened: nn.Module | None = field(default=None, repr=False)

    @cached_property
    def model(self) -> Any:
        """The pruned model; opened from `output_dir` if it was never in memory."""
        if self.opened is not None:
            return self.opened
        assert self.output_dir is not None
        return load_model(Checkpoint.open(self.output_dir))

    @property
    def mean_relative_error(self) -> float:
        """Mean over matrices of ``||W X - What Xhat|| / ||W X||``."""
        return sum(record.relative_error for record in self.records) / len(self.records)

    @property
    def median_proven_gap(self) -> float | None:
        """Median over the matrices whose gap was proven; None if there are none."""
        return median_gap(self.records)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all pruned matrices."""
        sizes = [record.shape[0] * record.shape[1] for record in self.records]
        zeros = [
            size * record.sparsity for size, record in zip(sizes, self.records, strict=True)
        ]
        return sum(zeros) / sum(sizes)


class Listeners:
    """All callbacks of a run, told together; one without ``on_note`` gets no notes."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_start(self, n_layers: int) -> None:
        """Everything was checked."""
        for callback in self._callbacks:
            callback.on_start(n_layers)

    def on_note(self, text: str) -> None:
        """Something that a reader of the log should know."""
        for callback in self._callbacks:
            if (on_note := getattr(callback, "on_note", None)) is not None:
                on_note(text)

    def on_notes(self, texts: Iterable[str]) -> None:
        """Several things that a reader of the log should know."""
        for text in texts:
            self.on_note(text)

    def on_layer(self, record: LayerRecord) -> None:
        """One matrix is done."""
        for callback in self._callbacks:
            callback.on_layer(record)

    def on_finish(self, report: PruneReport) -> None:
        """All of it is done and saved."""
        for callback in self._callbacks:
            callback.on_finish(report)

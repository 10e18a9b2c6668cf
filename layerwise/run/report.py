"""Progress callbacks of a run, and its result."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model
from layerwise.run.pipeline.records import LayerRecord, median_gap
from layerwise.run.remaining import Remaining


class Callback(Protocol):
    """Called as a run progresses; the methods below may do nothing.

    A callback may also have these methods: ``on_note(text)`` gets lines for the log,
    ``on_status(text)`` what is done now, for a status line, and ``on_left(seconds)`` the
    expected time to the end, before `on_layer`.
    """

    def on_start(self, n_layers: int) -> None:
        """All checks passed; `n_layers` matrices will be pruned."""

    def on_layer(self, record: LayerRecord) -> None:
        """One matrix is done, now or by the interrupted run that is resumed."""

    def on_finish(self, report: "PruneReport") -> None:
        """The run is finished and saved."""


@dataclass(frozen=True, eq=False)
class PruneReport:
    """Result of a run.

    Parameters
    ----------
    records
        Figures of every pruned matrix, in order.
    masks
        Mask of every pruned weight, by parameter name and in its shape, True = kept. With
        an `output_dir`, each mask is read from there on access.
    output_dir
        Folder of the pruned model, or None.
    seconds
        Wall time of the run.
    parameters_left
        Fraction of the decoder-block parameters that remains; 1 unless channels were
        removed.
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
    """All callbacks of a run, called together; methods that one lacks are left out."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = tuple(callbacks)
        self._remaining = Remaining({})

    def on_start(self, work: Mapping[str, float]) -> None:
        """All checks passed; `work` is the expected work of every layer by name."""
        self._remaining = Remaining(work)
        for callback in self._callbacks:
            callback.on_start(len(work))

    def on_note(self, text: str) -> None:
        """Pass on a line for the log."""
        self._tell("on_note", text)

    def on_status(self, text: str) -> None:
        """Pass on what is done now."""
        self._tell("on_status", text)

    def _tell(self, method: str, value: object) -> None:
        """Call an optional method of all callbacks that have it."""
        for callback in self._callbacks:
            if (tell := getattr(callback, method, None)) is not None:
                tell(value)

    def on_notes(self, texts: Iterable[str]) -> None:
        """Pass on several lines for the log."""
        for text in texts:
            self.on_note(text)

    def on_layer(self, record: LayerRecord) -> None:
        """One matrix is done."""
        left = self._remaining.after(record.name, record.seconds)
        if left is not None:
            self._tell("on_left", left)
        for callback in self._callbacks:
            callback.on_layer(record)

    def on_finish(self, report: PruneReport) -> None:
        """The run is finished and saved."""
        for callback in self._callbacks:
            callback.on_finish(report)

"""Progress of a retraining: a bar with loss and remaining time, or plain lines."""

import time
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from layerwise.recovery.records import UnitRecord
from layerwise.recovery.retrain import RetrainReport
from layerwise.reports.lines import SILENCE, Lines
from layerwise.reports.progress import bar
from layerwise.run.steps import about

EVERY = 10.0  # seconds between two plain lines about steps


def unit_line(record: UnitRecord) -> str:
    """Figures of a unit in one line."""
    measure = "relative error" if record.name else "loss"
    result = "unchanged"
    if record.learning_rate is not None:
        result = f"learning rate {record.learning_rate:g}"
    return (
        f"{record.name or 'model'}  {record.trained:,} parameters  held-out {measure} "
        f"{record.before:.4f} -> {record.after:.4f}  {result}  {record.seconds:.1f} s"
    )


def total_line(report: RetrainReport) -> str:
    """Totals of a run in one line."""
    where = "" if report.output_dir is None else f", written to {report.output_dir}"
    return (
        f"{report.trained:,} of {report.parameters:,} parameters trained "
        f"({report.fraction:.3%}), {report.seconds:.1f} s{where}"
    )


class PlainProgress:
    """A line per unit and, every ten seconds, one about the step."""

    def __init__(self, stream: TextIO) -> None:
        self._lines = Lines(stream)
        self._total = self._per_unit = self._done = self._units = self._began_at = 0
        self._start = self._last_line = time.monotonic()

    def on_note(self, text: str) -> None:
        """Write a remark."""
        self._lines.write(text)

    def on_status(self, text: str) -> None:
        """Write what is done now if it takes long."""
        self._lines.now(text)

    def on_start(self, total: int, per_unit: int) -> None:
        """Announce the number of updates."""
        self._lines.patience = SILENCE
        self._total, self._per_unit = total, per_unit
        self._start = self._last_line = time.monotonic()
        self._lines.write(f"retraining, at most {total} updates")

    def on_step(self, learning_rate: float, step: int, loss: float) -> None:
        """Write a line if the last one is old enough."""
        self._done += 1
        now = time.monotonic()
        if now - self._last_line < EVERY:
            return
        self._last_line = now
        made = self._done - self._began_at
        left = (now - self._start) / made * (self._total - self._done)
        self._lines.write(
            f"[{self._done}/{self._total}]  loss {loss:.4f}  learning rate "
            f"{learning_rate:g}  {about(left)} left"
        )

    def on_unit(self, record: UnitRecord) -> None:
        """Write the line of a unit."""
        self._units += 1
        if self._done < self._units * self._per_unit:  # done by the interrupted run
            self._began_at += self._units * self._per_unit - self._done
        self._done = self._units * self._per_unit
        self._lines.write(unit_line(record))

    def on_finish(self, report: RetrainReport) -> None:
        """Write the totals."""
        self.close()
        self._lines.write(total_line(report))

    def close(self) -> None:
        """Write no more lines about long steps."""
        self._lines.close()


class RichProgress:
    """A bar with the loss."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = Lines(console.file)  # before there is a bar
        self._progress = bar("retraining", console)
        self._task = self._progress.add_task("", total=None)
        self._per_unit = self._units = 0

    def on_note(self, text: str) -> None:
        """Print a remark above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def on_status(self, text: str) -> None:
        """Show what is done now."""
        self._lines.now(text)
        self._progress.update(self._task, description=escape(text))

    def on_start(self, total: int, per_unit: int) -> None:
        """Show the bar."""
        self._lines.close()
        self._per_unit = per_unit
        self._progress.update(self._task, total=total)
        self._progress.start()

    def on_step(self, learning_rate: float, step: int, loss: float) -> None:
        """Move the bar."""
        text = f"loss {loss:.4f}  learning rate {learning_rate:g}"
        self._progress.update(self._task, advance=1, description=text)

    def on_unit(self, record: UnitRecord) -> None:
        """Print the line of a unit above the bar."""
        self._units += 1
        self._progress.update(self._task, completed=self._units * self._per_unit)
        self._console.print(unit_line(record), markup=False, highlight=False)

    def on_finish(self, report: RetrainReport) -> None:
        """Replace the bar by the totals."""
        self.close()
        self._console.print(total_line(report), markup=False, highlight=False)

    def close(self) -> None:
        """Restore the terminal, after an error as well."""
        self._lines.close()
        self._progress.stop()

"""Progress of a run: a bar on a terminal, one plain line per layer otherwise."""

from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from layerwise.reports.lines import PATIENCE, SILENCE, Lines
from layerwise.run.pipeline.records import LayerRecord, in_percent
from layerwise.run.report import PruneReport
from layerwise.run.steps import about


def layer_line(record: LayerRecord) -> str:
    """Figures of a layer in one line."""
    parts = [
        f"{record.name}  {record.shape[0]}x{record.shape[1]}",
        f"sparsity {record.sparsity:.4f}",
        f"relative error {record.relative_error:.4f}",
        record.status,
        f"damping {record.damping:g}" + (" (raised)" if record.damping_raised else ""),
        f"rank {record.rank}/{record.shape[1]}",
        f"{record.seconds:.2f} s",
    ]
    if record.proven_gap is not None:
        parts.insert(4, f"proven within {in_percent(record.proven_gap)} of the optimum")
    if record.certificate is not None:
        parts.insert(4, f"{record.certificate_kind} <= {record.certificate:.1e}")
    return "  ".join(parts)


class PlainProgress:
    """One line per layer, for logs and pipes, and one about a step that takes long."""

    def __init__(self, stream: TextIO) -> None:
        self._lines = Lines(stream)
        self._done, self._total, self._left = 0, 0, ""

    def on_note(self, text: str) -> None:
        """Write a remark."""
        self._lines.write(text)

    def on_status(self, text: str) -> None:
        """Write what is done now if it takes long."""
        self._lines.now(text)

    def on_left(self, seconds: float) -> None:
        """Remember the expected time to the end."""
        self._left = f" {about(seconds)} left"

    def on_start(self, n_layers: int) -> None:
        """Announce the number of layers."""
        self._total = n_layers
        self._lines.write(f"pruning {n_layers} layers")

    def on_layer(self, record: LayerRecord) -> None:
        """Write the line of a layer."""
        self._done += 1
        self._lines.patience = SILENCE if self._done < self._total else PATIENCE
        count = f"[{self._done}/{self._total}]{self._left}"
        self._lines.write(f"{count}  {layer_line(record)}")
        self._left = ""

    def on_finish(self, report: PruneReport) -> None:
        """Write the totals."""
        self.close()
        self._lines.write(summary_line(report))

    def close(self) -> None:
        """Write no more lines about long steps."""
        self._lines.close()


class StageCounter:
    """One line per stored file of grams."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._done, self._total, self._left = 0, 0, ""

    def on_start(self, n_files: int) -> None:
        """Announce the number of files."""
        self._total = n_files
        self._lines.write(f"storing {n_files} files of grams")

    def on_left(self, seconds: float) -> None:
        """Remember the expected time to the end."""
        self._left = f" {about(seconds)} left"

    def on_stage(self, name: str, width: int) -> None:
        """Write the line of a file."""
        self._done += 1
        count = f"[{self._done}/{self._total}]{self._left}"
        self._lines.write(f"{count}  {name}  {width} inputs")
        self._left = ""


def bar(title: str, console: Console, left: ProgressColumn | None = None) -> Progress:
    """Bar with a title, counts, times and a description.

    `left` is the column of the remaining time, by default at the mean speed so far.
    """
    return Progress(
        TextColumn(f"[bold]{title}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        left or TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=console,
    )


class RichProgress:
    """A bar with the figures of the last layer, or with what is done now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines = Lines(console.file)  # before there is a bar
        self._progress = bar("pruning", console, TextColumn("{task.fields[left]}"))
        self._task = self._progress.add_task("", total=None, left="")

    def on_note(self, text: str) -> None:
        """Print a remark above the bar."""
        self._console.print(text, markup=False, highlight=False)

    def on_status(self, text: str) -> None:
        """Show what is done now, in place of the last layer."""
        self._lines.now(text)
        self._progress.update(self._task, description=escape(text))

    def on_left(self, seconds: float) -> None:
        """Show the expected time to the end."""
        self._progress.update(self._task, left=f"{about(seconds)} left")

    def on_start(self, n_layers: int) -> None:
        """Show the bar."""
        self._lines.close()
        self._progress.update(self._task, total=n_layers)
        self._progress.start()

    def on_layer(self, record: LayerRecord) -> None:
        """Move the bar; layers that needed more damping stay visible."""
        if record.damping_raised or record.status == "max_iterations":
            self._console.print(layer_line(record), markup=False, highlight=False)
        text = f"{record.name}  error {record.relative_error:.4f}"
        if record.proven_gap is not None:
            text += f"  within {in_percent(record.proven_gap)}"
        self._progress.update(self._task, advance=1, description=text)

    def on_finish(self, report: PruneReport) -> None:
        """Replace the bar by the totals."""
        self.close()
        self._console.print(summary_line(report), markup=False, highlight=False)

    def close(self) -> None:
        """Restore the terminal, after an error as well."""
        self._lines.close()
        self._progress.stop()


def summary_line(report: PruneReport) -> str:
    """Totals of a run in one line."""
    where = "" if report.output_dir is None else f", written to {report.output_dir}"
    proven, gap = "", report.median_proven_gap
    if gap is not None:
        proven = f", proven within {in_percent(gap)} of the optimum (median)"
    return (
        f"{len(report.records)} layers, sparsity {report.sparsity:.4f}, mean relative "
        f"error {report.mean_relative_error:.4f}{proven}, {report.seconds:.1f} s{where}"
    )

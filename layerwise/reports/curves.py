"""Plot of a race: relative error against seconds, one panel per layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, UsageError
from layerwise.reports.plots import SETTINGS, import_matplotlib, log_ticks, look
from layerwise.timing.race import Race

PANEL = (4.6, 3.4)  # inches
COLUMNS = 2
MARGIN = 1.06  # factor by which the axes extend beyond the ticks
SUFFIXES = (".svg", ".png", ".pdf")


def check_picture(path: Path) -> None:
    """Raise unless a plot can be written to this file; called before the race."""
    if path.suffix not in SUFFIXES:
        message = f"a plot must be one of {', '.join(SUFFIXES)}, got {path.name!r}"
        raise UsageError(message)
    import_matplotlib()


def draw_race(race: Race, path: Path) -> None:
    """Write the plot; a method that reports no iterations is one point."""
    check_picture(path)
    matplotlib = import_matplotlib()
    layers = list(dict.fromkeys(lap.layer for lap in race.laps))
    methods = list(dict.fromkeys(lap.method for lap in race.laps))
    columns = min(COLUMNS, len(layers))
    rows = -(-len(layers) // columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**SETTINGS, "svg.hashsalt": "race"})
        size = (PANEL[0] * columns, PANEL[1] * rows)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).flatten()
        lines = {}
        for panel, layer in zip(panels, layers, strict=False):
            panel.set_title(layer)
            laps = [lap for lap in race.laps if lap.layer == layer]
            points = [point for lap in laps for point in lap.curve if min(point) > 0]
            _draw_axes(panel, points)
            for lap in laps:
                colour, marker, dash = look(methods.index(lap.method))
                shown = [point for point in lap.curve if point in points]
                (lines[lap.method],) = panel.plot(
                    [seconds for seconds, _ in shown],
                    [error for _, error in shown],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linestyle="dashed" if dash else "solid",
                    linewidth=1.2,
                )
        for panel in panels[len(layers) :]:
            panel.set_axis_off()
        figure.legend(
            lines.values(), lines, loc="outside lower center", ncols=2, frameon=False
        )
        try:
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except OSError as error:
            message = f"cannot write {path}: {error.strerror}; choose another file"
            raise DataError(message) from error


def _draw_axes(panel: Any, points: Sequence[tuple[float, float]]) -> None:
    """Logarithmic axes with round numbers."""
    panel.set_xlabel("seconds")
    panel.set_ylabel("relative error")
    panel.grid(which="major")
    if not points:
        return
    seconds, errors = zip(*points, strict=True)
    panel.set_xscale("log")
    panel.set_yscale("log")
    for axis, values in (("x", seconds), ("y", errors)):
        ticks = log_ticks(min(values), max(values))
        labels = [f"{tick:g}" for tick in ticks]
        getattr(panel, f"set_{axis}ticks")(ticks, labels)
        getattr(panel, f"set_{axis}ticks")([], minor=True)
        getattr(panel, f"set_{axis}lim")(ticks[0] / MARGIN, ticks[-1] * MARGIN)

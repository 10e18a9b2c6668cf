"""Plots of relative errors as inline SVG; the same records give the same bytes.

Every plot is a ``<figure>`` on a white background. The axes come from matplotlib; the
legend and the caption are HTML, so they wrap on a narrow screen. The axes show only numbers
and their own names, so no name of a layer or method can break a plot.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import pairwise
from typing import Any

from layerwise.errors import UsageError
from layerwise.run.pipeline.records import LayerRecord

# M. Okabe, K. Ito, "Color Universal Design", 2008, without yellow, which is faint on white.
COLOURS = "#0072b2 #d55e00 #009e73 #cc79a7 #e69f00 #56b4e9 #000000".split()
MARKERS = "o s ^ D v P X p <".split()
DASHES = ("", "4 2", "1 2")
INCHES = (4.6, 3.0)  # narrow, so that the text is legible on a phone
SWATCH_MARKER = 22.0  # polygons are rounded to about a unit, so units are small
MAX_TICKS = 7
MAX_BLOCKS_LABELLED = 12
MAX_MARKERS = 40
TICK_STEPS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0,))

SETTINGS = {
    "axes.edgecolor": "#59636e",
    "axes.labelcolor": "#1c2128",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib; wider than the browsers' fonts
    "font.size": 10.0,
    "grid.color": "#dfe3e8",
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "xtick.color": "#59636e",
    "xtick.labelcolor": "#1c2128",
    "ytick.color": "#59636e",
    "ytick.labelcolor": "#1c2128",
}


@dataclass(frozen=True)
class Series:
    """One line of a plot, with gaps where a logarithmic axis cannot show an error."""

    label: str
    positions: Sequence[float]
    errors: Sequence[float]

    def drawable(self) -> list[float]:
        """Errors, with NaN for those that are not positive and finite."""
        return [error if 0 < error < math.inf else math.nan for error in self.errors]


def import_matplotlib() -> Any:
    """Import matplotlib, or raise a usage error with the command that installs it."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.markers
    except ImportError as error:
        message = 'the report draws with matplotlib: pip install "layerwise[report]"'
        raise UsageError(message) from error
    return matplotlib


def block_of(name: str) -> int | None:
    """Index of a layer's decoder block: the first number in the layer's name."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def kind_of(name: str) -> str:
    """Kind of a linear, such as ``q_proj``: the last word of its name."""
    return name.rpartition(".")[2]


def methods_figure(methods: Mapping[str, Sequence[LayerRecord]], key: str) -> str:
    """Figure of the relative error over all layers in order, one line per method.

    Parameters
    ----------
    methods
        Records by the name of the method.
    key
        Prefix of the ids inside the figure, unique in the page.
    """
    names = list(dict.fromkeys(r.name for records in methods.values() for r in records))
    position = {name: float(index) for index, name in enumerate(names)}
    series = [
        Series(
            method,
            [position[record.name] for record in records],
            [record.relative_error for record in records],
        )
        for method, records in methods.items()
    ]
    blocks = [block_of(name) for name in names]
    starts = [i for i, block in enumerate(blocks) if i == 0 or block != blocks[i - 1]]
    spans = [
        (start - 0.5, end - 0.5, "" if blocks[start] is None else str(blocks[start]))
        for start, end in pairwise([*starts, len(names)])
    ]
    kinds = [kind_of(name) for name in names[: (*starts, len(names))[1]]] if names else []
    caption = f"Inside a block, from left to right: {', '.join(kinds)}."
    return _figure(series, spans, "block, its layers in order", caption, key)


def kinds_figure(records: Sequence[LayerRecord], key: str) -> str:
    """Figure of the relative error over the blocks, one line per kind of linear."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for index, record in enumerate(records):
        block = block_of(record.name)
        positions, errors = points.setdefault(kind_of(record.name), ([], []))
        positions.append(float(index if block is None else block))
        errors.append(record.relative_error)
    series = [Series(kind, *of_kind) for kind, of_kind in points.items()]
    blocks = sorted({x for one in series for x in one.positions})
    spans = [(x - 0.5, x + 0.5, f"{x:.0f}") for x in blocks]
    return _figure(series, spans, "block", "", key)


def _figure(
    series: Sequence[Series],
    spans: Sequence[tuple[float, float, str]],  # left, right, label of each block
    axis: str,
    caption: str,
    key: str,
) -> str:
    matplotlib = import_matplotlib()
    errors = [error for one in series for error in one.drawable()]
    missing = sum(map(math.isnan, errors))
    if missing:
        caption += (
            f" {missing} of {len(errors)} errors are zero or not finite and not drawn."
        )
    caption = f"<figcaption>{escape(caption.strip())}</figcaption>" if caption else ""
    if missing == len(errors):
        return f'<figure class="plot">{caption}</figure>'
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own settings must not change the bytes
        matplotlib.rcParams.update({**SETTINGS, "svg.hashsalt": key})
        figure = matplotlib.figure.Figure(figsize=INCHES, layout="constrained")
        axes = figure.subplots()
        _draw_axes(axes, [error for error in errors if error > 0], spans, axis)
        for index, one in enumerate(series):
            _draw_series(axes, one, index)
        buffer = StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
        svg = _inline(buffer.getvalue(), key, f"relative error by {axis}")
        items = "".join(
            f"<li>{_swatch(matplotlib, index)}{escape(one.label)}</li>"
            for index, one in enumerate(series)
        )
    return f'<figure class="plot">{svg}<ul class="legend">{items}</ul>{caption}</figure>'


def _draw_axes(
    axes: Any,
    errors: Sequence[float],
    spans: Sequence[tuple[float, float, str]],
    axis: str,
) -> None:
    ticks = log_ticks(min(errors), max(errors))
    axes.set_yscale("log")
    axes.set_ylim(min(ticks[0], min(errors)) / 1.06, max(ticks[-1], max(errors)) * 1.06)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_ylabel("relative error")
    axes.set_xlabel(axis)
    axes.set_xlim(spans[0][0], spans[-1][1])
    step = -(-len(spans) // MAX_BLOCKS_LABELLED)
    labelled = spans[::step]
    centres = [(left + right) / 2 for left, right, _ in labelled]
    axes.set_xticks(centres, [label for _, _, label in labelled])
    wide = any(right - left > 1 for left, right, _ in spans)  # blocks of several layers
    axes.tick_params(axis="x", length=0 if wide else 3)
    for left, right, _ in spans[1::2] if wide else ():
        axes.axvspan(left, right, color="#f1f3f5", linewidth=0, zorder=0)


def _draw_series(axes: Any, series: Series, index: int) -> None:
    every = -(-len(series.positions) // MAX_MARKERS)
    colour, marker, dash = look(index)
    repeated = len(set(series.positions)) < len(series.positions)  # several experts
    pattern = tuple(float(part) for part in dash.split())
    axes.plot(
        series.positions,
        series.drawable(),
        color=colour,
        linestyle="none" if repeated else ((0, pattern) if pattern else "solid"),
        linewidth=1.3,
        marker=marker,
        markersize=5.2,
        markeredgecolor="white",
        markeredgewidth=0.5,
        markevery=1 if repeated else (index % every, every),
    )


def look(index: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of a series; the first 63 series all differ."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)], dash


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers that enclose [low, high], at most `MAX_TICKS`."""
    exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    ticks: list[float] = []
    for steps in TICK_STEPS:
        round_numbers = [float(f"{s}e{exponent}") for exponent in exponents for s in steps]
        first = max(number for number in round_numbers if number <= low)
        last = min(number for number in round_numbers if number >= high)
        ticks = [number for number in round_numbers if first <= number <= last]
        if len(ticks) <= MAX_TICKS:
            return ticks
    return ticks[:: -(-len(ticks) // MAX_TICKS)]


def _inline(svg: str, key: str, label: str) -> str:
    """SVG file as an element of a page, its ids made unique by `key`."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    width, height = (72 * inches for inches in INCHES)
    view = f'viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg {view} role="img" aria-label="{escape(label)}">'
    svg = head + svg[svg.index(">") + 1 :]
    svg = re.sub(r'(\sid="|url\(#|\shref="#|xlink:href="#)', rf"\g<1>{key}-", svg)
    return re.sub(r"\s*\n\s*", "\n", svg.replace("xlink:href=", "href="))


def _swatch(matplotlib: Any, index: int) -> str:
    """Line and marker of a series, for the legend."""
    colour, marker, dash = look(index)
    style = matplotlib.markers.MarkerStyle(marker)
    outline = style.get_path().transformed(style.get_transform().scale(SWATCH_MARKER))
    points = " ".join(f"{x:.4g},{-y:.4g}" for x, y in outline.to_polygons()[0])
    lengths = " ".join(f"{4 * int(part)}" for part in dash.split())
    dashes = f' stroke-dasharray="{lengths}"' if dash else ""
    return (
        '<svg class="swatch" viewBox="-40 -18 80 36" aria-hidden="true">'
        f'<line x1="-40" x2="40" y1="0" y2="0" stroke="{colour}" stroke-width="6"{dashes}/>'
        f'<polygon points="{points}" fill="{colour}" stroke="white" stroke-width="2"/>'
        "</svg>"
    )

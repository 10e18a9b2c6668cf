"""Figures of the report: every error where it belongs, and what cannot be drawn."""

import math
import re
from itertools import pairwise

import pytest

from layerwise.reports import plots
from layerwise.reports.plots import COLOURS, MAX_TICKS, kinds_figure, methods_figure
from tests.support.reports import Document, layers, record


def drawn_points(figure: str, colour: str) -> list[tuple[float, float]]:
    """Corners of the line of one colour."""
    path = re.search(rf'<path d="([^"]*)" clip-path[^>]*stroke: {colour};', figure)
    assert path
    pairs = re.findall(r"[ML] ([\d.]+) ([\d.]+)", path[1])
    return [(float(x), float(y)) for x, y in pairs]


def check_heights(points: list[tuple[float, float]], errors: list[float]) -> None:
    """Heights must be one linear function of the logarithms."""
    heights, logs = [-y for _, y in points], [math.log(error) for error in errors]
    assert len(heights) == len(logs)
    slope = (heights[1] - heights[0]) / (logs[1] - logs[0])
    assert slope > 0
    expected = [heights[0] + slope * (value - logs[0]) for value in logs]
    assert heights == pytest.approx(expected, abs=0.01)


def test_methods_figure_draws_the_errors_in_order() -> None:
    records = {"wanda": layers(2.0), "fista": layers()}
    figure = methods_figure(records, "k")
    for colour, own in zip(COLOURS, records.values(), strict=False):
        points = drawn_points(figure, colour)
        check_heights(points, [one.relative_error for one in own])
        steps = [right[0] - left[0] for left, right in pairwise(points)]
        assert steps == pytest.approx([steps[0]] * len(steps), abs=0.01)
    assert "Inside a block, from left to right: q_proj, up_proj, down_proj." in figure
    assert re.findall(r"<li>.*?</svg>(.*?)</li>", figure) == ["wanda", "fista"]


def test_kinds_figure_draws_one_line_per_kind() -> None:
    figure = kinds_figure(layers(), "k")
    for index, colour in enumerate(COLOURS[:3]):
        own = [one.relative_error for one in layers()[index::3]]
        check_heights(drawn_points(figure, colour), own)
    kinds = re.findall(r"<li>.*?</svg>(.*?)</li>", figure)
    assert kinds == ["q_proj", "up_proj", "down_proj"]


def test_errors_that_cannot_be_drawn_are_counted() -> None:
    odd = [0.1, 0.0, math.inf, math.nan, 0.2]
    records = [record(f"layers.{i}.fc1", error) for i, error in enumerate(odd)]
    assert "3 of 5 errors are zero or not finite and not drawn." in kinds_figure(
        records, "k"
    )
    empty = methods_figure({"dense": records[1:4]}, "k")
    assert "3 of 3 errors" in empty
    assert "<svg" not in empty


@pytest.mark.parametrize("layout", ["no blocks", "experts", "many blocks", "many methods"])
def test_unusual_models_are_drawn(layout: str) -> None:
    names = {
        "no blocks": ["first", "second"],
        "experts": [f"layers.{i}.experts.{j}.w1" for i in range(2) for j in range(3)],
        "many blocks": [f"layers.{i}.fc{j}" for i in range(90) for j in range(3)],
        "many methods": ["layers.0.fc1", "layers.1.fc1"],
    }[layout]
    records = [record(name, 0.1 + 0.001 * i) for i, name in enumerate(names)]
    count = 30 if layout == "many methods" else 2
    figure = methods_figure({f"method {i}": records for i in range(count)}, "k")
    figure += kinds_figure(records, "l")
    Document(figure)
    assert figure.count("<svg viewBox") == 2
    looks = re.findall(r"<li>(<svg.*?</svg>)", figure)[:count]
    assert len(set(looks)) == count
    assert re.findall(r"<text[^>]*>block", figure)


@pytest.mark.parametrize(
    ("low", "high"), [(0.1, 0.1), (0.11, 0.19), (0.04, 0.9), (1e-9, 3.0), (1e-300, 1e300)]
)
def test_ticks_enclose_the_data(low: float, high: float) -> None:
    ticks = plots.log_ticks(low, high)
    assert 1 <= len(ticks) <= MAX_TICKS
    assert ticks == sorted(ticks)
    assert ticks[0] <= low

"""Tables of :mod:`tests.benchmarks.real_model`, as Markdown. What is missing is a dot."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import geometric_mean, median
from typing import Any

from layerwise.experiments.experiment import DENSE
from tests.benchmarks.real_cells import Cell

MISSING = "…"
MB = 1 << 20
REFERENCE = Cell("sparsegpt")  # of all times
SHOWN = (
    Cell(DENSE),
    Cell("wanda"),
    Cell("sparsegpt"),
    Cell("best"),
    Cell("columns", "0.2"),
)

Find = Callable[[Cell], Mapping[str, Any] | None]


def page(tables: Mapping[str, Sequence[Cell]], find: Find) -> list[str]:
    """Lines of all tables."""
    makers: Mapping[str, Callable[[Sequence[Cell], Find], list[str]]] = {
        "dense": _dense,
        "zeros": _zeros,
        "channels": _channels,
        "error correction": lambda cells, find: _grid(cells, find, "error_correction"),
        "damping": lambda cells, find: _grid(cells, find, "damping"),
        "calibration": lambda cells, find: _grid(cells, find, "n_sequences"),
        "parts": _parts,
        "retrain": _retrain,
        "gaps": _gaps,
    }
    lines: list[str] = []
    for name, cells in tables.items():
        lines += [f"### {name.capitalize()}", "", *makers[name](cells, find), ""]
    if set(tables) == set(makers):
        lines += ["### Text", "", *_texts(find), ""]
    every = dict.fromkeys(cell for cells in tables.values() for cell in cells)
    missing = sum(find(cell) is None for cell in every)
    if missing:
        lines.append(f"{missing} of {len(every)} runs are missing: run the command again.")
    return lines


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(result: Mapping[str, Any] | None, name: str = "perplexity") -> str:
    if result is None:
        return MISSING
    if "refused" in result:
        return "refused"
    return _number(result[name])


def _number(value: float) -> str:
    return f"{value:.3g}" if value >= 1000 or value < 1 else f"{value:.2f}"


def _dense(cells: Sequence[Cell], find: Find) -> list[str]:
    return [f"Perplexity of the model as it is: {_cell(find(cells[0]))}."]


def _zeros(cells: Sequence[Cell], find: Find) -> list[str]:
    patterns = list(dict.fromkeys(cell.sparsity for cell in cells))
    rows = []
    for first in dict.fromkeys(replace(cell, sparsity="0.5") for cell in cells):
        versions = [replace(first, sparsity=pattern) for pattern in patterns]
        values = [_cell(find(c)) if c in cells else "" for c in versions]
        label = first.method + (f", {first.effort}" if first.effort else "")
        rows.append([label, *values, *_costs(first, find)])
    return _table(["method", *patterns, "error", "CPU s", "ratio", "peak", "plan"], rows)


def _costs(cell: Cell, find: Find) -> list[str]:
    """Error, time and memory of a run."""
    result = find(cell)
    if result is None or "refused" in result:
        return [MISSING] * 5
    reference = find(REFERENCE)
    ratio = MISSING
    if reference is not None:
        ratio = f"{result['cpu_seconds'] / reference['cpu_seconds']:.2f}"
    planned = result["plan"].get("bytes")
    return [
        f"{result['mean_relative_error']:.4f}",
        f"{result['cpu_seconds']:.0f}",
        ratio,
        f"{result['peak_bytes'] / MB:.0f} MiB",
        MISSING if planned is None else f"{planned / MB:.0f} MiB",
    ]


def _channels(cells: Sequence[Cell], find: Find) -> list[str]:
    shares = sorted({cell.sparsity for cell in cells})
    rows = []
    for first in dict.fromkeys(replace(cell, sparsity="0.2") for cell in cells):
        versions = [replace(first, sparsity=share) for share in shares]
        values = [_cell(find(c)) if c in cells else "" for c in versions]
        label = first.method + (f", {first.format}" if first.format else "")
        rows.append([label, *values, *_costs(first, find)[:4]])
    return _table(["method", *shares, "error", "CPU s", "ratio", "peak"], rows)


def _grid(cells: Sequence[Cell], find: Find, name: str) -> list[str]:
    """Methods by the values of one setting."""
    values = list(dict.fromkeys(getattr(cell, name) for cell in cells))
    rows = [
        [method, *(_cell(find(Cell(method, **{name: value}))) for value in values)]
        for method in dict.fromkeys(cell.method for cell in cells)
    ]
    return _table(["method", *(f"{value}" for value in values)], rows)


def _parts(cells: Sequence[Cell], find: Find) -> list[str]:
    """Rise of the loss if one part of the model alone is pruned."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    dense = find(Cell(DENSE))
    rows = []
    for target in dict.fromkeys(cell.targets for cell in cells):
        results = [find(Cell(method, targets=target)) for method in methods]
        label = target.removeprefix("re:.*(").removesuffix(")").replace("|", ", ")
        values = [
            MISSING if r is None or dense is None else _rise(r, dense) for r in results
        ]
        rows.append([label.replace("\\", "").replace("..*_proj", ""), *values])
    return _table(["pruned alone", *methods], rows)


def _rise(result: Mapping[str, Any] | None, dense: Mapping[str, Any] | None) -> str:
    """Rise of the mean loss of a token over that of the dense model."""
    if result is None or dense is None:
        return MISSING
    return f"{math.log(result['perplexity'] / dense['perplexity']):+.4f}"


def _retrain(cells: Sequence[Cell], find: Find) -> list[str]:
    sets = list(dict.fromkeys(cell.retrain for cell in cells))
    rows = [
        [
            method,
            _cell(find(Cell(method))),
            *(_cell(find(Cell(method, retrain=name))) for name in sets),
        ]
        for method in dict.fromkeys(cell.method for cell in cells)
    ]
    return _table(["method", "pruned", *(f"{name}" for name in sets)], rows)


def _gaps(cells: Sequence[Cell], find: Find) -> list[str]:
    """Median proven gap and relative error by kind of matrix and by block."""
    lines: list[str] = []
    for cell in cells:
        result = find(cell)
        if result is None:
            continue
        layers: dict[str, Any] = result["layers"]
        blocks = [int(name.split(".")[2]) for name in layers]
        ends = {min(blocks): "first block", max(blocks): "last block"}
        by_kind: dict[str, list[tuple[float, float]]] = {}
        for block, (name, (error, gap, _)) in zip(blocks, layers.items(), strict=True):
            for key in (name.rpartition(".")[2], ends.get(block, "other blocks")):
                by_kind.setdefault(key, []).append((error, gap))
        rows = [
            [
                kind,
                f"{geometric_mean(error for error, _ in figures):.4f}",
                f"{median(gap for _, gap in figures):.1%}",
            ]
            for kind, figures in by_kind.items()
        ]
        lines += [f"{cell.method}:", "", *_table(["matrices", "error", "proven gap"], rows)]
        lines.append("")
    return lines[:-1] or [MISSING]


def _texts(find: Find) -> list[str]:
    lines = []
    for cell in SHOWN:
        result = find(cell)
        text = MISSING if result is None else " ".join(result["text"].split())
        lines.append(f"- **{cell.label()}**: {text}")
    return lines

"""Perplexity of smaller models: methods, structures and rules, stock and native.

    python -m tests.benchmarks.smaller_models OUT [--jobs 2]
    python -m tests.benchmarks.smaller_models OUT --table

The three packaged models lose 10, 20, 30 and 50 % of the parameters of their blocks.
Results are kept in ``OUT/smaller.jsonl`` as they come, and a repeated command goes on.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from layerwise.experiments.experiment import DENSE, Experiment
from layerwise.experiments.results import ResultStore
from tests.benchmarks.perplexity_grid import (
    MISSING,
    command_line,
    complete,
    find,
    in_workers,
)

SPARSITIES = ("0.1", "0.2", "0.3", "0.5")
MODELS = ("llama", "opt", "mamba")
FORMATS = ("stock", "native")


@dataclass(frozen=True)
class Row:
    """A way to make a model smaller."""

    method: str
    kind: str
    allocation: str

    @property
    def label(self) -> str:
        """First cell of the row."""
        return f"{self.method}, {self.kind}, {self.allocation}"


STOCK = (
    Row("magnitude-sp", "columns", "uniform"),
    Row("wanda-sp", "columns", "uniform"),
    Row("fasp", "columns", "uniform"),
    Row("flap", "columns", "uniform"),
    Row("flap", "heads", "uniform"),
    Row("flap", "heads", "ul-mm:4"),
    Row("columns", "columns", "optimal"),
    Row("columns", "heads", "optimal"),
)
NATIVE = (
    Row("magnitude-sp", "columns", "uniform"),
    Row("wanda-sp", "columns", "uniform"),
    Row("fasp", "columns", "uniform"),
    Row("flap", "heads", "uniform"),
    Row("flap", "heads", "ul-mm:4"),
    Row("flap", "heads", "al-mm:4"),
    Row("flap", "heads", "al-am"),
    Row("columns", "columns", "uniform"),
    Row("columns", "columns", "optimal"),
    Row("columns", "heads", "optimal"),
)


def rows(model: str, format: str) -> tuple[Row, ...]:
    """Rows that mean something for a model: Mamba has one structure, OPT stock no heads."""
    found = STOCK if format == "stock" else NATIVE
    if model == "mamba":
        return tuple(r for r in found if r.kind == "columns" or r.allocation == "al-am")
    if model == "opt" and format == "stock":
        return tuple(row for row in found if row.kind == "columns")
    return found


def experiment(model: str, format: str, row: Row, sparsity: str) -> Experiment:
    """One cell of a table."""
    return Experiment(
        model,
        row.method,
        sparsity,
        kind=row.kind,
        allocation=row.allocation,
        format=format,
    )


def experiments() -> list[Experiment]:
    """All cells, and the dense models."""
    cells = [
        experiment(model, format, row, sparsity)
        for model in MODELS
        for format in FORMATS
        for row in rows(model, format)
        for sparsity in SPARSITIES
    ]
    return [*(Experiment(model, DENSE) for model in MODELS), *cells]


def tables(store: ResultStore) -> list[str]:
    """Lines of Markdown."""
    lines: list[str] = []
    for model in MODELS:
        dense = find(store, Experiment(model, DENSE)) or {}
        for format in FORMATS:
            lines += [f"{model}, {format}, dense {dense.get('perplexity', MISSING)}:", ""]
            lines += [f"| method, structure, rule | {' | '.join(SPARSITIES)} |"]
            lines += ["|---" * (1 + len(SPARSITIES)) + "|"]
            for row in rows(model, format):
                cells = [find(store, experiment(model, format, row, s)) for s in SPARSITIES]
                lines.append(f"| {row.label} | {' | '.join(map(_cell, cells))} |")
            lines += [*_ratios(store, model, format, dense), ""]
    return lines


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return MISSING
    if "perplexity" not in result:
        return next(iter(result))
    return f"{result['perplexity']:.3f}"


def _ratios(
    store: ResultStore, model: str, format: str, dense: dict[str, Any]
) -> Sequence[str]:
    """Increase by the best of `columns` over that by the best of FASP and FLAP."""
    if not dense:
        return []
    found = []
    for sparsity in SPARSITIES:
        increases: dict[bool, list[float]] = {True: [], False: []}
        for row in rows(model, format):
            result = find(store, experiment(model, format, row, sparsity)) or {}
            if "perplexity" in result and row.method in ("columns", "fasp", "flap"):
                ours = row.method == "columns"
                increases[ours].append(result["perplexity"] - dense["perplexity"])
        ratio = MISSING
        if increases[True] and increases[False]:
            ratio = f"{min(increases[True]) / min(increases[False]):.3f}"
        found.append(ratio)
    return [f"| increase, columns / best of fasp and flap | {' | '.join(found)} |"]


def main() -> None:
    """Complete the results, then print the tables."""
    store, jobs, table = command_line("Perplexity of smaller models.", "smaller.jsonl")
    if not table:
        complete(store, experiments(), partial(in_workers, jobs=jobs))
    sys.stdout.write("\n".join(tables(store)) + "\n")


if __name__ == "__main__":
    main()

"""How far `best` is from the optimum at most, proven by lower bounds.

    python -m tests.benchmarks.proven_gaps FOLDER

The captured layers of every packaged model, at 50 % and 2:4, with two dampings: the share
of the damped objective that any other mask and weights could save at most, for the layer
and the median of its rows. `FOLDER` caches the layers.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch

from layerwise.evaluate import objective_rows
from layerwise.lower_bounds import lower_bounds
from layerwise.patterns import parse_pattern
from layerwise.solve import solve
from tests.benchmarks.captured import CapturedLayer, captured_layers

PATTERNS = ("0.5", "2:4")
DAMPINGS = (0.01, 1e-4)
METHOD = "best"
COLUMNS = tuple(product(PATTERNS, DAMPINGS))


def gaps(
    layer: CapturedLayer, pattern: str, damping: float, method: str = METHOD
) -> tuple[float, float, float, float]:
    """Gap of the layer, median of its rows, CPU seconds of the method and the bounds."""
    problem = layer.problem(parse_pattern(pattern), damping)
    begin = time.process_time()
    weight = solve(problem, method).weight
    solved = time.process_time()
    bounds = lower_bounds(problem, weight)
    bounded = time.process_time()
    values = objective_rows(problem, weight, damped=True)
    of_layer = 1 - float(bounds.sum() / values.sum())
    of_rows = float((1 - bounds / values).quantile(0.5))
    return of_layer, of_rows, solved - begin, bounded - solved


def table(layers: Sequence[CapturedLayer], method: str = METHOD) -> Iterator[str]:
    """Lines of a Markdown table."""
    heads = " | ".join(f"{pattern}, {damping:g}" for pattern, damping in COLUMNS)
    yield f"| layer | shape | {heads} | {method}, CPU s | bounds, CPU s |"
    yield "|---" * (4 + len(COLUMNS)) + "|"
    seen: list[list[tuple[float, float, float, float]]] = []
    for layer in layers:
        seen.append([gaps(layer, *column, method) for column in COLUMNS])
        shape = " x ".join(map(str, layer.weight.shape))
        yield f"| {layer.name} | {shape} | {_cells(seen[-1])}"
    middle = [
        tuple(statistics.median(figures) for figures in zip(*column, strict=True))
        for column in zip(*seen, strict=True)
    ]
    yield f"| median | | {_cells(middle)}"


def _cells(found: Sequence[Sequence[float]]) -> str:
    shares = " | ".join(f"{of_layer:.1%} / {rows:.1%}" for of_layer, rows, *_ in found)
    solving, bounding = (sum(one[i] for one in found) / len(found) for i in (2, 3))
    return f"{shares} | {solving:.1f} | {bounding:.2f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Proven gaps of captured layers.")
    parser.add_argument("folder", type=Path, help="folder of the cache")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    layers = captured_layers(options.folder)
    sys.stdout.write("Gap of the layer / median gap of its rows:\n\n")
    for line in table(layers):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

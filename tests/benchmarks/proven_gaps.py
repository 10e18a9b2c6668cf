"""How far `best` is from the optimum at most, proven by lower bounds.

    python -m tests.benchmarks.proven_gaps FOLDER

Two of the captured layers of every packaged model, at 50 % and 2:4, with two dampings: the
share of the damped objective that any other mask and weights could save at most, for the
layer and the median of its rows. `FOLDER` caches the layers.
"""

import argparse
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
from tests.benchmarks.captured import LINEARS, CapturedLayer, captured_layers

PATTERNS = ("0.5", "2:4")
DAMPINGS = (0.01, 1e-4)
METHOD = "best"
CHOSEN = {name for linears in LINEARS.values() for name in (linears[0], linears[-1])}
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
    for layer in layers:
        found = [gaps(layer, *column, method) for column in COLUMNS]
        cells = " | ".join(f"{of_layer:.1%} / {rows:.1%}" for of_layer, rows, *_ in found)
        solving, bounding = (
            sum(result[i] for result in found) / len(found) for i in (2, 3)
        )
        shape = " x ".join(map(str, layer.weight.shape))
        yield f"| {layer.name} | {shape} | {cells} | {solving:.1f} | {bounding:.2f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Proven gaps of captured layers.")
    parser.add_argument("folder", type=Path, help="folder of the cache")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    layers = [
        layer
        for layer in captured_layers(options.folder)
        if any(layer.name.endswith(name) for name in CHOSEN)
    ]
    sys.stdout.write("Gap of the layer / median gap of its rows:\n\n")
    for line in table(layers):
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

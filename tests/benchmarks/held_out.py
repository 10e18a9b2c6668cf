"""Error of every method on its calibration tokens and on tokens it never saw.

    python -m tests.benchmarks.held_out OUT

A refit fits the calibration tokens, with few tokens too well: the error on held-out
tokens shows it, and damping is the remedy. Every method on the twelve captured layers, at
50 %, 70 % and 2:4, for six dampings, with 16384 calibration tokens and with an eighth of
them. Results are kept in ``OUT`` as they come, and a repeated command goes on.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch

from layerwise.demo import MODELS
from layerwise.errors import InvalidProblemError, SolveError
from layerwise.evaluate import relative_error
from layerwise.experiments.demo import all_methods
from layerwise.experiments.results import ResultStore
from layerwise.experiments.sources import code_identity
from layerwise.patterns import parse_pattern
from layerwise.solve import solve
from tests.benchmarks.captured import (
    LENGTH,
    N_SEQUENCES,
    CapturedLayer,
    captured_layers,
    identity,
)

PATTERNS = ("0.5", "0.7", "2:4")
SEQUENCES = (N_SEQUENCES, N_SEQUENCES // 8)
DAMPINGS = (1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)
EXTREMES = (DAMPINGS[0], DAMPINGS[-1])
MISSING = "…"


def errors(
    layers: Sequence[CapturedLayer], method: str, pattern: str, damping: float
) -> dict[str, Any]:
    """Mean relative errors over layers, or why there are none."""
    chosen = parse_pattern(pattern)
    seen, unseen = [], []
    try:
        for layer in layers:
            problem = layer.problem(chosen, damping)
            weight = solve(problem, method).weight
            seen.append(relative_error(problem, weight))
            unseen.append(relative_error(layer.held_out(chosen), weight))
    except InvalidProblemError as error:
        return {"refused": str(error)}
    except SolveError as error:
        return {"failed": str(error)}
    return {
        "calibration": sum(seen) / len(seen),
        "held_out": sum(unseen) / len(unseen),
    }


def complete(store: ResultStore, folder: Path, methods: Sequence[str]) -> None:
    """Compute what is missing, method by method."""
    layers = {n: captured_layers(folder, n) for n in SEQUENCES}
    for method, n, pattern in product(methods, SEQUENCES, PATTERNS):
        for damping in (*EXTREMES, *DAMPINGS[1:-1]):
            if find(store, method, pattern, n, damping) is not None:
                continue
            if damping not in EXTREMES and _is_constant(store, method, pattern, n):
                continue  # damping changes nothing: the extremes agree to the last bit
            result = errors(layers[n], method, pattern, damping)
            store.add(_task(method, pattern, n, damping), fingerprint(method), result)
            sys.stderr.write(f"{method} {pattern} {n} {damping:g}: {result}\n")


def find(
    store: ResultStore, method: str, pattern: str, n: int, damping: float
) -> dict[str, Any] | None:
    """Result of the code as it is now."""
    return store.find(_task(method, pattern, n, damping), fingerprint(method))


@cache
def fingerprint(method: str) -> str:
    """Hash of the captured layers and of the code of a method."""
    decisive = {
        "layers": [identity(model, n) for model in MODELS for n in SEQUENCES],
        **code_identity(method, ["layerwise.solve", "layerwise.evaluate"]),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def tables(store: ResultStore, methods: Sequence[str]) -> list[str]:
    """Lines of Markdown, one table per number of tokens and pattern."""
    lines: list[str] = []
    for n, pattern in product(SEQUENCES, PATTERNS):
        heading = f"{pattern}, {n * LENGTH} calibration tokens"
        dampings = " | ".join(f"{damping:g}" for damping in DAMPINGS)
        lines += [
            f"{heading}, mean relative error on calibration / on held-out tokens:",
            "",
            f"| method | {dampings} | best damping |",
            "|---" * (2 + len(DAMPINGS)) + "|",
        ]
        lines += [_row(store, method, pattern, n) for method in methods]
        lines.append("")
    return lines


def _row(store: ResultStore, method: str, pattern: str, n: int) -> str:
    found = {
        damping: result
        for damping in DAMPINGS
        if (result := find(store, method, pattern, n, damping)) is not None
    }
    if reasons := [r for r in found.values() if "held_out" not in r]:
        word, reason = next(iter(reasons[0].items()))
        return f"| {method} | {word}: {reason} |" + " |" * len(DAMPINGS)
    if _is_constant(store, method, pattern, n):
        same = _errors_text(found[DAMPINGS[0]])
        return f"| {method} | {same} |" + " |" * (len(DAMPINGS) - 1) + " any |"
    cells = [_errors_text(found.get(damping)) for damping in DAMPINGS]
    best = min(found, key=lambda damping: found[damping]["held_out"], default=None)
    complete = len(found) == len(DAMPINGS) and best is not None
    cells.append(f"{best:g}" if complete else MISSING)
    return f"| {method} | {' | '.join(cells)} |"


def _is_constant(store: ResultStore, method: str, pattern: str, n: int) -> bool:
    """Whether the extreme dampings gave the same errors, to the last bit."""
    smallest, largest = (find(store, method, pattern, n, d) for d in EXTREMES)
    return smallest is not None and smallest == largest


def _errors_text(result: dict[str, Any] | None) -> str:
    if result is None:
        return MISSING
    return f"{result['calibration']:.4f} / {result['held_out']:.4f}"


def _task(method: str, pattern: str, n: int, damping: float) -> dict[str, Any]:
    return {"method": method, "pattern": pattern, "sequences": n, "damping": damping}


def main() -> None:
    """Complete the results, then print the tables."""
    parser = argparse.ArgumentParser(description="Errors on held-out tokens.")
    parser.add_argument("output", type=Path, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    store = ResultStore(arguments.output / "held-out.jsonl")
    methods = all_methods()
    if not arguments.table:
        complete(store, arguments.output, methods)
    sys.stdout.write("\n".join(tables(store, methods)) + "\n")


if __name__ == "__main__":
    main()

"""Variants of multi-weight and their block sizes on wider layers.

Run from the root of the repository: ``python -m tests.benchmarks.multi_weight_variants``.

Damped objective over that of ``sparsegpt+least-squares`` for the four families of
:mod:`tests.benchmarks.optimality`, geometric mean over layers of 64 rows and 256 inputs.
"""

import sys
from collections.abc import Mapping, Sequence

import torch

import layerwise as lw
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.multi_weight import MultiWeight
from tests.benchmarks.optimality import SPECTRA, problems

LAYERS, ROWS, WIDTH = 3, 64, 256
PATTERNS: Sequence[Pattern] = (
    Unstructured(0.5),
    Unstructured(0.7),
    Unstructured(0.5, "layer"),
    NM(2, 4),
    NM(4, 8),
)
BLOCKED = {f"mm, block_size {size}": MultiWeight(block_size=size) for size in (4, 32, 128)}
METHODS: Mapping[str, str | MultiWeight] = {
    "sparsegpt": "sparsegpt",
    **{name: f"multi-weight-{name}" for name in ("ss", "sm", "ms", "mm")},
    **BLOCKED,
}


def objective(problem: LayerProblem, method: str | MultiWeight) -> float:
    """Damped objective of a method's answer."""
    weight = lw.solve(problem, method).weight
    return float(objective_rows(problem, weight, damped=True).sum())


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    lines = [f"| pattern | method | {' | '.join(SPECTRA)} |", "|---" * 6 + "|"]
    for pattern in PATTERNS:
        columns = []
        for spectrum in SPECTRA:
            posed = list(problems(spectrum, pattern, LAYERS, ROWS, WIDTH))
            found = [[objective(p, method) for method in METHODS.values()] for p in posed]
            base = [[objective(problem, "sparsegpt+least-squares")] for problem in posed]
            columns.append((torch.tensor(found) / torch.tensor(base)).log().mean(0).exp())
        lines += [
            f"| {pattern} | {name} | {' | '.join(f'{float(c[i]):.3f}' for c in columns)} |"
            for i, name in enumerate(METHODS)
            if isinstance(pattern, Unstructured) or name not in BLOCKED
        ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Race of our SparseGPT against the published implementation, in one process.

The published code (IST-DASLab/sparsegpt, Apache-2.0) is not part of this repository:

    git clone https://github.com/IST-DASLab/sparsegpt PEER
    python -m tests.benchmarks.sparsegpt_race PEER

One square layer with correlated inputs, half of the weights of the whole layer
removed, masks chosen per block of 128 columns. Runs alternate; the table shows the
minimum of each and their ratio, and the objective of the weights that each returned.
"""

import argparse
import contextlib
import io
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from layerwise.evaluate import objective_rows
from layerwise.patterns import Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.sparsegpt import SparseGPT


def make_problem(width: int, tokens: int) -> LayerProblem:
    """Layer whose inputs are correlated and whose channels have log-normal scales."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    mix += 0.5 * torch.eye(width)
    scales = torch.randn(width, generator=generator).exp()
    inputs = (torch.randn(tokens, width, generator=generator) @ mix * scales).T
    weight = torch.randn(width, width, generator=generator) / width**0.5
    pattern = Unstructured(0.5, group="layer")
    return LayerProblem.from_inputs(weight, inputs, pattern=pattern)


def load_peer(folder: Path) -> ModuleType:
    """Import ``sparsegpt.py`` of a clone of the published repository."""
    sys.path.insert(0, str(folder))
    with mock.patch.dict(sys.modules, {"transformers": ModuleType("transformers")}):
        sys.modules["transformers"].Conv1D = type("Conv1D", (), {})  # type: ignore[attr-defined]
        import importlib

        return importlib.import_module("sparsegpt")


def run_peer(peer: Any, problem: LayerProblem) -> tuple[Tensor, float]:
    """Weights of ``fasterprune`` and its seconds."""
    width = problem.shape[1]
    linear = nn.Linear(width, problem.shape[0], bias=False)
    linear.weight.data.copy_(problem.weight)
    method = peer.SparseGPT(linear)
    method.H = 2 * problem.gram.float()
    idle = mock.patch.object(torch.cuda, "synchronize")
    start = time.perf_counter()
    with idle, contextlib.redirect_stdout(io.StringIO()):
        method.fasterprune(0.5, blocksize=128, percdamp=0.01)
    return linear.weight.data, time.perf_counter() - start


def run_ours(problem: LayerProblem) -> tuple[Tensor, float]:
    """Weights of our solver and its seconds, factorization included."""
    fresh = LayerProblem.from_moments(
        problem.weight, replace(problem.moments), pattern=problem.pattern
    )
    start = time.perf_counter()
    weight = SparseGPT().solve(fresh).weight
    return weight, time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description="Race of our SparseGPT against the published one."
    )
    parser.add_argument("peer", type=Path, help="clone of IST-DASLab/sparsegpt")
    parser.add_argument("--width", type=int, default=2048, help="of a square layer")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    peer = load_peer(arguments.peer)
    problem = make_problem(arguments.width, 4 * arguments.width)
    rows: dict[str, SimpleNamespace] = {}
    for _ in range(arguments.runs):
        for name, (weight, seconds) in {
            "fasterprune": run_peer(peer, problem),
            "layerwise": run_ours(problem),
        }.items():
            row = rows.setdefault(name, SimpleNamespace(seconds=[]))
            row.seconds.append(seconds)
            row.objective = float(objective_rows(problem, weight).sum())
            row.zeros = int((weight == 0).sum())
    theirs, ours = rows["fasterprune"], rows["layerwise"]
    lines = ["| implementation | seconds (min) | objective | zeros |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {min(row.seconds):.4f} | {row.objective:.6f} | {row.zeros} |"
        for name, row in rows.items()
    ]
    lines.append(
        f"\nobjective ratio {ours.objective / theirs.objective:.5f}, "
        f"speed ratio {min(theirs.seconds) / min(ours.seconds):.2f}x"
    )
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

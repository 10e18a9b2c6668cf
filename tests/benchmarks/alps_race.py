"""Race of `best` against the published ALPS, on layers of the packaged models.

The published program (mazumder-lab/ALPS, MIT licence) is not part of this repository:

    git clone https://github.com/mazumder-lab/ALPS PEER
    python -m tests.benchmarks.alps_race PEER CACHE [--effort thorough] [--block 2]

Both get the same grams and the same budget, which the published program counts over the
whole matrix, in one process and in turns. It runs unchanged but for its device, written
in its source as ``cuda:0``. It damps by 0.01 of the mean diagonal; ours by `--damping`.
Errors are squared and undamped, and evaluated by us in float64.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solve import solve
from layerwise.solvers.best import EFFORTS, Best
from tests.benchmarks.captured import CapturedLayer, add_block_option, captured_layers

PATTERNS: tuple[Pattern, ...] = (
    Unstructured(0.5, "layer"),
    Unstructured(0.7, "layer"),
    NM(2, 4),
)


@dataclass(frozen=True)
class Race:
    """Squared error and seconds of both on one layer."""

    layer: str
    pattern: str
    error: float
    seconds: float
    peer_error: float
    peer_seconds: float


def load_peer(folder: Path) -> Any:
    """Module of ``alps.py`` in a clone of the published repository, on the CPU."""
    source = (folder / "alps.py").read_text(encoding="utf-8").replace("cuda:0", "cpu")
    module = ModuleType("alps")
    exec(compile(source, "alps.py", "exec"), vars(module))
    return module


def run_peer(peer: Any, problem: LayerProblem) -> tuple[Tensor, float]:
    """Weights of the published program, and its seconds."""
    rows, width = problem.shape
    linear = nn.Linear(width, rows, bias=False)
    linear.weight.data.copy_(problem.weight)
    method = peer.ALPS_prune(linear, 1, 1)
    method.XtX = problem.gram.float()
    pattern = problem.pattern
    start = time.perf_counter()
    with mock.patch.object(torch.cuda, "synchronize"):
        if isinstance(pattern, NM):  # its n counts kept entries
            method.ALPS_admm(pattern.sparsity, nm_n=pattern.n, nm_m=pattern.m)
        else:
            assert isinstance(pattern, Unstructured)
            method.ALPS_admm(pattern.sparsity)
    return linear.weight.data, time.perf_counter() - start


def run_ours(solver: Best, problem: LayerProblem) -> tuple[Tensor, float]:
    """Weights of our solver and its seconds, factorizations included."""
    fresh = replace(problem, moments=replace(problem.moments))
    start = time.perf_counter()
    return solve(fresh, solver).weight, time.perf_counter() - start


def race(
    peer: Any, solver: Best, layer: CapturedLayer, pattern: Pattern, damping: float, n: int
) -> Race:
    """Both, in turns, n times; times are medians."""
    problem = layer.problem(pattern, damping)
    theirs, ours = [], []
    for _ in range(n):
        theirs.append(run_peer(peer, problem))
        ours.append(run_ours(solver, problem))

    def squared_error(weight: Tensor) -> float:
        return float(objective_rows(problem, weight).sum())

    return Race(
        layer.name,
        str(pattern),
        squared_error(ours[0][0]),
        statistics.median(seconds for _, seconds in ours),
        squared_error(theirs[0][0]),
        statistics.median(seconds for _, seconds in theirs),
    )


def table(races: Sequence[Race]) -> list[str]:
    """Lines of Markdown: every layer, and geometric means."""
    lines = [
        "| layer | pattern | ALPS | error ratio | ALPS, s | time ratio |",
        "|---|---|---|---|---|---|",
    ]
    for run in races:
        lines.append(
            f"| {run.layer} | {run.pattern} | {run.peer_error:.4g} "
            f"| {run.error / run.peer_error:.3f} | {run.peer_seconds:.3f} "
            f"| {run.seconds / run.peer_seconds:.2f} |"
        )
    lines.append("")
    patterns = [*dict.fromkeys(run.pattern for run in races), "all"]
    lines += ["| geometric mean | error ratio | time ratio |", "|---|---|---|"]
    for pattern in patterns:
        chosen = [run for run in races if pattern in (run.pattern, "all")]
        error = _mean([run.error / run.peer_error for run in chosen])
        seconds = _mean([run.seconds / run.peer_seconds for run in chosen])
        lines.append(f"| {pattern} | {error:.4f} | {seconds:.2f} |")
    return lines


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.mean(math.log(ratio) for ratio in ratios))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="best against the published ALPS")
    parser.add_argument("peer", type=Path, help="clone of mazumder-lab/ALPS")
    parser.add_argument("cache", type=Path, help="folder of the captured layers")
    parser.add_argument("--effort", choices=EFFORTS, default="balanced")
    parser.add_argument("--damping", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=3)
    add_block_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    peer, solver = load_peer(options.peer), Best(effort=options.effort)
    races = []
    for pattern in PATTERNS:
        for layer in captured_layers(options.cache, block=options.block):
            found = race(peer, solver, layer, pattern, options.damping, options.repeats)
            races.append(found)
            sys.stderr.write(f"{table([found])[2]}\n")
    sys.stdout.write("\n".join(table(races)) + "\n")


if __name__ == "__main__":
    main()

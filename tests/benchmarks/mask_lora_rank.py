"""How near a low-rank change comes to the exact refit, by its rank.

    python -m tests.benchmarks.mask_lora_rank OUT

Four layers of the packaged LLaMA, pruned by Wanda at 50 %: the damped objective above that
of the exact refit on the same mask, as a share of what the refit gains. A table, and the
picture ``OUT/masklora-rank.svg``.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from layerwise.evaluate import objective_rows
from layerwise.patterns import FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solve import solve
from layerwise.solvers.mask_lora import MaskLoRA
from tests.benchmarks.captured import captured_layers

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)


def shares(problem: LayerProblem) -> tuple[list[float], list[float]]:
    """Share of the gain of the refit that is missed, and seconds, by rank."""
    start = solve(problem, "wanda")
    fixed = problem.with_pattern(FixedMask(start.mask))

    def value(weight: torch.Tensor) -> float:
        return float(objective_rows(fixed, weight, damped=True).sum())

    refit = value(solve(fixed, "least-squares").weight)
    gain = value(start.weight) - refit
    missed, seconds = [], []
    for rank in RANKS:
        begin = time.perf_counter()
        found = solve(fixed, MaskLoRA(rank=rank), initial=start)
        seconds.append(time.perf_counter() - begin)
        missed.append((value(found.weight) - refit) / gain)
    return missed, seconds


def main() -> None:
    """Print the table and draw the picture."""
    parser = argparse.ArgumentParser(description="MaskLoRA against the exact refit.")
    parser.add_argument("output", type=Path, help="folder of the picture")
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    write = sys.stdout.write
    write(f"| layer | rank {' | '.join(map(str, RANKS))} |\n")
    write("|---" * (1 + len(RANKS)) + "|\n")
    for layer in captured_layers(output):
        if not layer.name.startswith("llama/"):
            continue
        name = layer.name.rpartition(".")[2]
        missed, seconds = shares(layer.problem(Unstructured(0.5)))
        cells = (f"{m:.1%} ({s:.1f} s)" for m, s in zip(missed, seconds, strict=True))
        write(f"| {name} | {' | '.join(cells)} |\n")
        axes.plot(RANKS, [max(m, 1e-6) for m in missed], marker="o", label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rank of the change",
        ylabel="share of the refit's gain that is missed",
        title="MaskLoRA approaches the exact refit",
    )
    axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
    axes.legend()
    figure.savefig(output / "masklora-rank.svg")


if __name__ == "__main__":
    main()

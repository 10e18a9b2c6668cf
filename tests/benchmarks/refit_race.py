"""Race of the exact refit against Cholesky factorizations row by row, and plain CG.

    python -m tests.benchmarks.refit_race [--repeats 5] [--threads 2]
    python -m tests.benchmarks.refit_race --crossover
    python -m tests.benchmarks.refit_race --sides

Half of the weights of every row kept by Wanda, float32 weights, grams drawn as ``real-ish``
(:mod:`tests.benchmarks.optimality`) and with the spectra of captured layers. Ours is the
whole call on fresh moments: factorizations, certificates of every row below 1e-6, grading.
Jacobi-CG is the same call on the supports of the rows, with ``rank=0`` and float32
products. A peer factors ``G_SS`` in float32 and solves, no more; rows cost the same, so a
peer is timed on a few of them and its time is that of a row times the rows.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from layerwise.moments import Moments
from layerwise.patterns import FixedMask, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Status
from layerwise.solvers.least_squares import RANK_SHARE, LeastSquares, direct_pays
from layerwise.solvers.refit.spread import ratio_of_iterations
from tests.benchmarks.optimality import SPECTRA
from tests.benchmarks.spectra import FLAT, MIDDLE, STEEP, realistic_gram

SHAPES = ((2048, 2048), (1024, 4096))  # rows, width
DAMPINGS = (0.01, 1e-4)
TOLERANCE = 1e-6
PEER_ROWS = 16
LAYERS: Mapping[str, str] = MappingProxyType(
    {"steep": STEEP, "middle": MIDDLE, "flat": FLAT}
)
DRAWN = "real-ish"  # of :mod:`tests.benchmarks.optimality`
CROSSOVER = ((512, 128), (1024, 128), (2048, 64))  # width, rows
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
SIDES = (1024, 128)  # width, rows
SIDES_DAMPINGS = (0.1, 0.01, 1e-3, 1e-4)
SIDES_SPARSITIES = (0.3, 0.5, 0.7, 0.9)
WAYS = (
    LeastSquares(method="cg", products="float32", side="support", rank=0),
    LeastSquares(method="cg", products="float32", side="support"),
    LeastSquares(method="cg", products="float32", side="complement"),
)


def gram_of(label: str, width: int) -> Tensor:
    """Gram of a spectrum by its name, shape (width, width), float64."""
    if label == DRAWN:
        return SPECTRA[DRAWN](torch.Generator().manual_seed(0), width)
    return realistic_gram(width, LAYERS[label])


def make_problem(gram: Tensor, rows: int, damping: float, sparsity: float) -> LayerProblem:
    """Layer on fresh moments, its mask chosen by Wanda."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(rows, len(gram), generator=generator)
    scores = weight.abs() * gram.diagonal().sqrt().float()
    mask = Unstructured(sparsity).mask(scores)
    return LayerProblem.from_moments(
        weight, Moments(gram, n_tokens=len(gram)), pattern=FixedMask(mask), damping=damping
    )


def seconds_of(solver: LeastSquares, problem: LayerProblem) -> tuple[float, int, float]:
    """Seconds, iterations and certificate of one call."""
    start = time.perf_counter()
    found = solver.solve(problem)
    seconds = time.perf_counter() - start
    assert found.certificate is not None
    assert found.status is Status.OPTIMAL, found.certificate
    return seconds, found.iterations, found.certificate.bound


def batched(gram: Tensor, sides: Tensor, index: Tensor) -> Tensor:
    """Kept weights of all rows by one call of torch."""
    systems = gram[index[:, :, None], index[:, None, :]]
    lower = torch.linalg.cholesky_ex(systems)[0]
    return torch.cholesky_solve(sides.gather(1, index)[:, :, None], lower)[:, :, 0]


def looped(gram: Tensor, sides: Tensor, index: Tensor) -> Tensor:
    """Kept weights row by row in torch."""
    found = []
    for side, kept in zip(sides, index, strict=True):
        lower = torch.linalg.cholesky_ex(gram[kept[:, None], kept])[0]
        found.append(torch.cholesky_solve(side[kept][:, None], lower)[:, 0])
    return torch.stack(found)


def by_scipy(gram: Tensor, sides: Tensor, index: Tensor) -> Tensor:
    """Kept weights row by row in scipy."""
    matrix, targets = gram.numpy(), sides.numpy()
    found = []
    for side, kept in zip(targets, index.numpy(), strict=True):
        factor = scipy.linalg.cho_factor(
            matrix[kept[:, None], kept], lower=True, check_finite=False, overwrite_a=True
        )
        found.append(scipy.linalg.cho_solve(factor, side[kept], check_finite=False))
    return torch.from_numpy(np.stack(found))


PEERS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = MappingProxyType(
    {"torch batched": batched, "torch looped": looped, "scipy": by_scipy}
)


def seconds_of_peers(problem: LayerProblem) -> dict[str, float]:
    """Seconds that every peer would need for all rows."""
    rows = len(problem.weight)
    count = min(PEER_ROWS, rows)
    systems = systems_of(problem, count)
    found = {}
    for name, peer in PEERS.items():
        start = time.perf_counter()
        peer(*systems)
        found[name] = (time.perf_counter() - start) * rows / count
    return found


def systems_of(problem: LayerProblem, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Damped gram, right-hand sides and kept indices of the first rows."""
    mask = problem.pattern.mask(problem.weight)[:count]
    gram, target = problem.damped()
    return gram, target[:count], mask.nonzero()[:, 1].view(count, -1)


def race(repeats: int) -> list[str]:
    """Table of the race, medians of the repeats, everything in turns."""
    lines = [
        "| rows x in | spectrum | damping | ours (iterations) | Jacobi-CG | ratio "
        f"| {' | '.join(PEERS)} | ratio to the fastest |",
        "|---" * (7 + len(PEERS)) + "|",
    ]
    ours = LeastSquares(tolerance=TOLERANCE)
    plain = LeastSquares(
        tolerance=TOLERANCE, method="cg", side="support", rank=0, products="float32"
    )
    for rows, width in SHAPES:
        for label in (DRAWN, *LAYERS):
            gram = gram_of(label, width)
            for damping in DAMPINGS:
                taken: dict[str, list[float]] = {}
                iterations: dict[str, int] = {}
                for _ in range(repeats):
                    for name, solver in (("ours", ours), ("jacobi", plain)):
                        fresh = make_problem(gram, rows, damping, 0.5)
                        seconds, steps, _ = seconds_of(solver, fresh)
                        taken.setdefault(name, []).append(seconds)
                        iterations[name] = steps
                    peers = seconds_of_peers(make_problem(gram, rows, damping, 0.5))
                    for name, seconds in peers.items():
                        taken.setdefault(name, []).append(seconds)
                median = {name: statistics.median(t) for name, t in taken.items()}
                fastest = min(median[name] for name in PEERS)
                cells = [
                    f"{rows} x {width}",
                    label,
                    f"{damping:g}",
                    f"{median['ours']:.2f} s ({iterations['ours']})",
                    f"{median['jacobi']:.2f} s ({iterations['jacobi']})",
                    f"{median['jacobi'] / median['ours']:.1f}x",
                    *(f"{median[name]:.1f} s" for name in PEERS),
                    f"{fastest / median['ours']:.1f}x",
                ]
                lines.append(f"| {' | '.join(cells)} |")
                sys.stderr.write(lines[-1] + "\n")
    return lines


def crossover(repeats: int) -> list[str]:
    """Milliseconds per row of both ways, and which one is chosen."""
    lines = [
        "| in | damping | sparsity | direct, ms a row | cg, ms a row | chosen |",
        "|---|---|---|---|---|---|",
    ]
    for width, rows in CROSSOVER:
        gram = gram_of("steep", width)
        for damping in DAMPINGS:
            for sparsity in SPARSITIES:
                median = {}
                for method in ("direct", "cg"):
                    solver = LeastSquares(tolerance=TOLERANCE, method=method)
                    problem = make_problem(gram, rows, damping, sparsity)
                    seconds_of(solver, problem)  # shared factors are there from here on
                    median[method] = statistics.median(
                        seconds_of(solver, problem)[0] for _ in range(repeats)
                    )
                mask = problem.pattern.mask(problem.weight)
                chosen = "direct" if direct_pays(problem, mask) else "cg"
                cells = [f"{width}", f"{damping:g}", f"{sparsity:g}"]
                cells += [f"{1000 * s / rows:.2f}" for s in median.values()]
                lines.append(f"| {' | '.join(cells)} | {chosen} |")
                sys.stderr.write(lines[-1] + "\n")
    return lines


def sides() -> list[str]:
    """Iterations of cg on either side of the masks, and their ratio as it is expected."""
    columns = " | ".join(f"{sparsity:g}" for sparsity in SIDES_SPARSITIES)
    lines = [
        f"| spectrum | damping | {columns} |",
        "|---" * (2 + len(SIDES_SPARSITIES)) + "|",
    ]
    width, rows = SIDES
    for label in LAYERS:
        gram = gram_of(label, width)
        for damping in SIDES_DAMPINGS:
            cells = [label, f"{damping:g}"]
            for sparsity in SIDES_SPARSITIES:
                problem = make_problem(gram, rows, damping, sparsity)
                taken = []
                for way in WAYS:
                    solver = replace(way, tolerance=TOLERANCE)
                    taken.append(seconds_of(solver, problem)[1])
                mask = problem.pattern.mask(problem.weight)
                expected = ratio_of_iterations(problem, mask, width // RANK_SHARE)
                cells.append(
                    " / ".join(map(str, taken))
                    + f" ({taken[1] / taken[2]:.1f}, expected {expected:.1f})"
                )
            lines.append(f"| {' | '.join(cells)} |")
            sys.stderr.write(lines[-1] + "\n")
    return lines


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="race of the exact refit")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--crossover", action="store_true", help="table by sparsity")
    parser.add_argument("--sides", action="store_true", help="iterations on both sides")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.sides:
        lines = sides()
    else:
        lines = (crossover if arguments.crossover else race)(arguments.repeats)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

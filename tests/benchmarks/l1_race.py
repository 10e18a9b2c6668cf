"""Race for the l1 problem whose penalty is not known: half of the weights shall be zero.

    python -m tests.benchmarks.l1_race [PEERS]

PEERS is a folder with celer, skglm and scikit-learn (``pip install --target PEERS celer
skglm scikit-learn``); those that cannot be imported are named. One layer with the
spectrum of a captured one, every answer to a relative duality gap of 1e-3:

- ``lasso_to_sparsity``, all rows;
- plain FISTA with bisection on the penalty: one step length, cold starts, no restarts,
  the same gap; on some rows;
- the peers, told the penalty that the first one found, on a few rows: seconds per row,
  multiplied by the number of rows. Their design matrix is the Cholesky factor of the
  gram, so they solve the same problem.
"""

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerwise.certificates import l1_bounds
from layerwise.moments import Moments
from layerwise.patterns import Unstructured
from layerwise.problem import LayerProblem
from layerwise.solvers.lasso_path import lasso_to_sparsity
from tests.benchmarks.spectra import MIDDLE, realistic_gram

GAP = 1e-3
SPARSITY = 0.5
BISECTIONS = 10
CHECK = 10  # iterations of plain FISTA between two evaluations of its gap
PEER_TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)  # loosest that proves the gap

PeerSolver = Callable[[Any, Any, float, float], Any]  # design, target, penalty, tolerance


def make_problem(rows: int, width: int) -> LayerProblem:
    """Random weights on a gram with a realistic spectrum."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator) / width**0.5
    moments = Moments(realistic_gram(width, MIDDLE))
    return LayerProblem.from_moments(weight, moments, pattern=Unstructured(SPARSITY))


def part(problem: LayerProblem, rows: int) -> LayerProblem:
    """The problem of the first rows."""
    return LayerProblem.from_moments(
        problem.weight[:rows], problem.moments, pattern=problem.pattern
    )


def subgradient_gap(
    problem: LayerProblem, weight: Tensor, subgradient: Tensor, penalty: float
) -> float:
    """Largest relative gap of the rows, in float64."""
    bounds = l1_bounds(problem, weight, penalty, subgradient)
    return float((bounds.excess / bounds.primal).max())


def plain_fista(problem: LayerProblem, penalty: float) -> tuple[Tensor, int]:
    """Textbook iteration from zero until every row proves the gap."""
    gram, target = problem.damped()
    step = 1 / float(torch.linalg.eigvalsh(gram.double())[-1])
    weight = ahead = torch.zeros_like(target)
    momentum, iterations = 1.0, 0
    while True:
        iterations += 1
        moved = ahead + step * (target - ahead @ gram)
        removed = moved.clamp(-step * penalty / 2, step * penalty / 2)
        following = moved - removed
        grown = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / grown * (following - weight)
        weight, momentum = following, grown
        if iterations % CHECK == 0:
            gap = subgradient_gap(problem, weight, removed / step, penalty)
            if gap <= GAP:
                return weight, iterations


def plain_bisection(problem: LayerProblem) -> tuple[float, int, int]:
    """Ten bisections on log penalty; its last penalty, iterations, and solves."""
    high = math.log(2 * float(problem.damped()[1].abs().max()))
    low, total = high - math.log(1e4), 0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        weight, iterations = plain_fista(problem, math.exp(middle))
        total += iterations
        if float((weight == 0).double().mean()) < SPARSITY:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2), total, BISECTIONS


def load_peers() -> tuple[dict[str, PeerSolver], list[str]]:
    """Solvers that can be imported, and names of those that cannot."""
    found: dict[str, PeerSolver] = {}
    missing = []
    for name, make in (
        ("celer", _celer),
        ("skglm", _skglm),
        ("scikit-learn", _sklearn),
        ("scikit-learn, gram given", _sklearn_gram),
    ):
        try:
            found[name] = make()
        except ImportError as error:
            missing.append(f"{name} ({error})")
    return found, missing


def _celer() -> PeerSolver:
    import celer  # type: ignore[import-not-found]

    def solve(design: Any, target: Any, alpha: float, tolerance: float) -> Any:
        model = celer.Lasso(alpha=alpha, tol=tolerance, fit_intercept=False)
        return model.fit(design, target).coef_

    return solve


def _skglm() -> PeerSolver:
    import skglm  # type: ignore[import-not-found]

    def solve(design: Any, target: Any, alpha: float, tolerance: float) -> Any:
        model = skglm.Lasso(alpha=alpha, tol=tolerance, fit_intercept=False)
        return model.fit(design, target).coef_

    return solve


def _sklearn() -> PeerSolver:
    from sklearn.linear_model import Lasso

    def solve(design: Any, target: Any, alpha: float, tolerance: float) -> Any:
        model = Lasso(alpha=alpha, tol=tolerance, fit_intercept=False, max_iter=100000)
        return model.fit(design, target).coef_

    return solve


def _sklearn_gram() -> PeerSolver:
    from sklearn.linear_model import Lasso  # pyright: ignore[reportMissingImports]

    def solve(design: Any, target: Any, alpha: float, tolerance: float) -> Any:
        model = Lasso(
            alpha=alpha,
            tol=tolerance,
            fit_intercept=False,
            max_iter=100000,
            precompute=solve.gram,  # type: ignore[attr-defined]
        )
        return model.fit(design, target).coef_

    return solve


def race_peer(
    solve: PeerSolver, problem: LayerProblem, penalty: float, rows: int
) -> tuple[float, float]:
    """Seconds per row at the loosest tolerance that proves the gap; and that gap.

    The gap is that of the l1 problem of the layer, with the better of two dual points.
    """
    few = part(problem, rows)
    lower = few.factor(torch.float64).lower
    design = np.asfortranarray(lower.T.numpy())
    gram, target = few.damped_gram(torch.float64), few.damped()[1].double()
    sides = torch.linalg.solve_triangular(lower, target.T, upper=False).T.contiguous()
    solve.gram = np.ascontiguousarray(gram.numpy())  # type: ignore[attr-defined]
    alpha = penalty / 2 / len(gram)  # they minimise ||y - X w||^2 / 2n + alpha |w|
    gap = seconds = math.inf
    solve(design, sides[0].numpy(), alpha, 1e-2)  # compiled where a peer compiles
    for tolerance in PEER_TOLERANCES:
        start = time.perf_counter()
        found = [solve(design, side.numpy(), alpha, tolerance) for side in sides]
        seconds = (time.perf_counter() - start) / rows
        weight = torch.from_numpy(np.stack(found))
        residual = target - weight @ gram
        gap = subgradient_gap(few, weight, residual, penalty)
        if gap <= GAP:
            break
    return seconds, gap


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="race for the l1 problem")
    parser.add_argument("peers", type=Path, nargs="?", help="folder of the peers")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--plain-rows", type=int, default=64)
    parser.add_argument("--peer-rows", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.peers:
        sys.path.append(str(arguments.peers))
    write = sys.stdout.write
    problem = make_problem(arguments.rows, arguments.width)
    times, answers = [], []
    for _ in range(arguments.runs):
        problem = LayerProblem.from_moments(
            problem.weight, Moments(problem.gram), pattern=problem.pattern
        )  # fresh: nothing is factored yet
        start = time.perf_counter()
        answers.append(lasso_to_sparsity(problem, SPARSITY, tolerance=GAP))
        times.append(time.perf_counter() - start)
    ours = answers[-1]
    seconds = statistics.median(times)
    products = ours.iterations + 2 * ours.checks
    write(f"{arguments.rows} x {arguments.width}, gap {GAP}\n\n")
    write("| method | products with the gram | seconds, all rows | zeros |\n")
    write("|---|---|---|---|\n")
    write(
        f"| lasso_to_sparsity, penalty unknown | {ours.iterations} + {2 * ours.checks} for "
        f"the gap | {seconds:.2f} | {ours.sparsity:.4f} |\n"
    )
    few = part(problem, arguments.plain_rows)
    start = time.perf_counter()
    _, plain, solves = plain_bisection(few)
    taken = (time.perf_counter() - start) * arguments.rows / arguments.plain_rows
    write(
        f"| plain FISTA, {solves} bisections | {plain} | {taken:.0f}, from "
        f"{arguments.plain_rows} rows | |\n"
    )
    peers, missing = load_peers()
    for name, solve in peers.items():
        found = [
            race_peer(solve, problem, ours.penalty, arguments.peer_rows)
            for _ in range(arguments.runs)
        ]
        each = statistics.median(entry[0] for entry in found)
        write(
            f"| {name}, penalty given | | {each * arguments.rows:.1f}, from "
            f"{arguments.peer_rows} rows, gap {found[0][1]:.0e} | |\n"
        )
    write(f"\n{plain / products:.0f} times fewer products than plain FISTA\n")
    for name in missing:
        write(f"NOT MEASURED, not installed: {name}\n")


if __name__ == "__main__":
    main()

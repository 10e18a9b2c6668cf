"""Cross-check table: our solvers against CLARABEL and against enumeration of all masks.

Run from the root of the repository: ``python -m tests.benchmarks.cross_check``.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

import layerwise as lw
from layerwise.certificates import refit_excess
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.solvers import SOLVERS, get_solver
from layerwise.solvers.lasso import lasso
from tests.support.problems import Layer, make_layer
from tests.support.reference import Equations
from tests.support.tolerances import LASSO_GAP, LASSO_ITERATIONS, ROUNDING

INSTANCES = 20
CONDITIONS = (1.0, 1e2, 1e4, 1e6)
PENALTIES = (0.02, 0.1, 0.5)  # shares of the penalty at which everything is zero
STOPS = (1, 5, 20, 100)  # iterations after which the gap is compared with the truth
SMALL_PATTERNS: Sequence[Pattern] = (Unstructured(0.5), Unstructured(0.75), NM(2, 4))


@dataclass
class Check:
    """Largest figure of a check, and how often a claim held."""

    worst: float = 0.0
    held: list[bool] = field(default_factory=list)

    def share(self) -> str:
        return f"{100 * sum(self.held) / len(self.held):.0f} % of {len(self.held)}"


def instances(rows: int, width: int) -> Iterator[Layer]:
    """Layers of rising difficulty; every second one has two input streams."""
    for seed in range(INSTANCES):
        yield make_layer(
            1000 + seed,
            rows,
            width,
            tokens=width // 2 if seed % 5 == 4 else 3 * width,
            drift=0.3 if seed % 2 else 0.0,
            condition=CONDITIONS[seed % len(CONDITIONS)],
            correlation=0.9 if seed % 3 == 2 else 0.0,
        )


def check_l1() -> tuple[Check, Check]:
    """l1 objective against CLARABEL, and the duality gap of unfinished runs."""
    agreement, gap = Check(), Check()
    for layer in instances(4, 24):
        problem = layer.problem(Unstructured(0))
        for share in PENALTIES:
            penalty = 2 * share * float(problem.damped()[1].abs().max())
            equations = Equations(layer)
            reference = equations.clarabel_l1(penalty)
            found = lasso(
                problem, penalty, tolerance=LASSO_GAP, max_iterations=LASSO_ITERATIONS
            )
            size = penalty * float(found.weight.abs().sum())
            value = equations.objective(found.weight) + size
            difference = abs(value - reference) / layer.energy
            agreement.worst = max(agreement.worst, difference)
            for stop in STOPS:
                early = lasso(problem, penalty, tolerance=0, max_iterations=stop)
                true = early.primal - reference
                slack = ROUNDING * layer.energy
                gap.held.append(true <= early.gap * early.primal + slack)
    return agreement, gap


def check_refit() -> tuple[Check, Check]:
    """Refit against CLARABEL, and its certificate for weights that are not optimal."""
    agreement, certificate = Check(), Check()
    for seed, layer in enumerate(instances(4, 24)):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(layer.shape, generator=generator) < 0.5
        problem = layer.problem(FixedMask(mask))
        equations = Equations(layer)
        reference = equations.clarabel_refit(mask)
        optimum = equations.objective_rows(reference)
        refit = lw.solve(problem, "least-squares").weight
        difference = abs(equations.objective(refit) - optimum.sum()) / layer.energy
        agreement.worst = max(agreement.worst, difference)
        masked = torch.where(mask, layer.weight, 0)
        for blend in (0.0, 1e-6, 1e-3, 1.0):
            weight = refit + blend * (masked - refit)
            excess = equations.objective_rows(weight.numpy()) - optimum
            bound = refit_excess(problem, weight, mask).numpy() * np.maximum(
                optimum, ROUNDING * problem.energy.numpy()
            )
            slack = ROUNDING * layer.energy
            certificate.held.append(bool((excess <= bound + slack).all()))
    return agreement, certificate


def check_masks() -> dict[str, list[float]]:
    """Damped objective of every method over that of the best mask, per solver."""
    ratios: dict[str, list[float]] = {}
    for layer in instances(2, 8):
        equations = Equations(layer)
        for pattern in SMALL_PATTERNS:
            minimum = equations.enumerated_minimum(pattern)
            problem = layer.problem(pattern)
            for name in SOLVERS:
                if not get_solver(name).can_solve(problem):
                    continue
                for method in (name, f"{name}+least-squares"):
                    value = equations.objective(lw.solve(problem, method).weight)
                    ratios.setdefault(method, []).append(value / minimum)
    return ratios


def main() -> int:
    """Print the tables; a failed claim is the exit code."""
    torch.set_num_threads(1)
    l1, gap = check_l1()
    refit, certificate = check_refit()
    masks = check_masks()
    lines = [
        "| check | result |",
        "|---|---|",
        f"| l1 objective against CLARABEL, largest difference / energy | {l1.worst:.1e} |",
        f"| refit against CLARABEL, largest difference / energy | {refit.worst:.1e} |",
        f"| duality gap is at least the true suboptimality | {gap.share()} |",
        f"| refit certificate is at least the true excess | {certificate.share()} |",
        "",
        f"Damped objective over that of the best mask (8 inputs, {INSTANCES} layers, "
        + f"{', '.join(str(pattern) for pattern in SMALL_PATTERNS)}):",
        "",
        "| method | worst | geometric mean | best mask found |",
        "|---|---|---|---|",
    ]
    for method, ratios in masks.items():
        mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
        found = sum(ratio <= 1 + 1e-6 for ratio in ratios) / len(ratios)
        lines.append(f"| {method} | {max(ratios):.2f} | {mean:.2f} | {100 * found:.0f} % |")
    sys.stdout.write("\n".join(lines) + "\n")
    best = min(min(ratios) for ratios in masks.values())
    held = all(gap.held) and all(certificate.held) and best >= 1 - ROUNDING
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

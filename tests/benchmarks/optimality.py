r"""Optimality table: every method against the best mask and weights of small layers.

Run from the root of the repository: ``python -m tests.benchmarks.optimality``.

Layers of 8 rows and 12 inputs are small enough to try every mask of a row. Weights are
standard normal and grams are drawn from four families, with a random rotation Q and n
inputs:

- ``power-law 1``, ``power-law 2``: ``Q diag(j^-a) Q^T`` with a = 1 or 2;
- ``real-ish``: ``D (Q diag(1/j) Q^T) D``, channel scales D = exp(normal), one of them
  ten times larger: an outlier channel;
- ``MLP-like``: ``X X^T / tokens`` of X = relu(Z - 1/2), 8 n tokens, Z normal with
  covariance ``n / sum(1/j) Q diag(1/j) Q^T``: one large direction, the mean, above a bulk.

Given is the damped objective of the layer over its minimum, for a method and for the
exact refit of its mask.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType

import torch
from torch import Generator, Tensor

import layerwise as lw
from layerwise.evaluate import objective_rows
from layerwise.experiments.demo import all_methods
from layerwise.moments import Moments
from layerwise.patterns import NM, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solve import resolve
from layerwise.solver import requirements
from layerwise.solvers import SOLVERS
from tests.support.reference import scip_minimum
from tests.support.tolerances import ROUNDING, SCIP_REFERENCE

ROWS, WIDTH, DAMPING = 8, 12, 0.01
PROBLEMS = 50
PATTERNS: Sequence[Pattern] = (NM(2, 4), Unstructured(0.5))
CROSS_CHECKED = 2  # rows of every family and pattern that SCIP solves as well, by default


def _power_law(exponent: float) -> Callable[[Generator, int], Tensor]:
    def draw(generator: Generator, width: int) -> Tensor:
        basis = torch.linalg.qr(_normal(generator, width, width))[0]
        order = torch.arange(1, width + 1, dtype=torch.float64)
        gram: Tensor = (basis * order**-exponent) @ basis.T
        return gram

    return draw


def _real_ish(generator: Generator, width: int) -> Tensor:
    gram = _power_law(1)(generator, width)
    scales = _normal(generator, width).exp()
    scales[int(torch.randint(width, (), generator=generator))] *= 10
    scaled: Tensor = scales[:, None] * gram * scales
    return scaled


def _mlp_like(generator: Generator, width: int) -> Tensor:
    covariance = _power_law(1)(generator, width)
    covariance /= covariance.diagonal().mean()
    tokens = 8 * width
    normal = torch.linalg.cholesky(covariance) @ _normal(generator, width, tokens)
    inputs: Tensor = (normal - 0.5).relu()
    return inputs @ inputs.T / tokens


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SPECTRA: Mapping[str, Callable[[Generator, int], Tensor]] = MappingProxyType(
    {
        "power-law 1": _power_law(1),
        "power-law 2": _power_law(2),
        "real-ish": _real_ish,
        "MLP-like": _mlp_like,
    }
)


def problems(
    spectrum: str, pattern: Pattern, count: int, rows: int = ROWS, width: int = WIDTH
) -> Iterator[LayerProblem]:
    """Layers of a family, the same ones for every pattern."""
    for seed in range(count):
        generator = Generator().manual_seed(seed)
        gram, mean = SPECTRA[spectrum](generator, width), torch.zeros(width)
        moments = Moments(gram, input_mean=mean)
        weight = _normal(generator, rows, width)
        yield LayerProblem.from_moments(weight, moments, pattern=pattern, damping=DAMPING)


def row_masks(pattern: Pattern, width: int) -> Tensor:  # (masks, in) bool
    """Every mask that a row of the pattern can have."""
    if isinstance(pattern, Unstructured) and pattern.group == "row":
        groups = [range(width)]
        removed = pattern.removed(width)
    else:
        assert isinstance(pattern, NM)
        groups = [range(begin, begin + pattern.m) for begin in range(0, width, pattern.m)]
        removed = pattern.m - pattern.n
    subsets: list[tuple[int, ...]] = [()]
    for group in groups:
        subsets = [
            left + right for left in subsets for right in combinations(group, removed)
        ]
    masks = torch.ones(len(subsets), width, dtype=torch.bool)
    return masks.scatter_(1, torch.tensor(subsets, dtype=torch.long), False)


def enumerated_optimum(problem: LayerProblem) -> tuple[Tensor, Tensor]:  # (out,), (out, in)
    """Damped optimum of every row over all masks, and the masks that reach it.

    If a row loses P, the kept rest K follows it, and the objective rises by
    ``w_P (G_PP - G_PK G_KK^-1 G_KP) w_P`` above its minimum without constraint. The Schur
    complements of all masks are one batch, shared by the rows.
    """
    assert problem.moments.cross_gram is None  # so that w is the dense weight
    masks = row_masks(problem.pattern, problem.shape[1])
    gram = problem.gram + problem.ridge * torch.eye(problem.shape[1], dtype=torch.float64)
    order = torch.argsort(masks, dim=1, stable=True)  # removed first
    removed = int((~masks[0]).sum())
    gone, kept = order[:, :removed, None], order[:, removed:, None]
    across = gram[kept, gone.mT]
    solved = torch.cholesky_solve(across, torch.linalg.cholesky(gram[kept, kept.mT]))
    complements = gram[gone, gone.mT] - across.mT @ solved
    weights = problem.weight.double()[:, gone[:, :, 0]]  # (out, masks, removed)
    losses = torch.einsum("omp,mpq,omq->om", weights, complements, weights)
    best = losses.min(dim=1)
    return best.values, masks[best.indices]


def methods() -> list[str]:
    """Every solver that chooses masks, and refitted if it does not refit by itself."""
    found = []
    for method in all_methods():
        if "+" not in method:
            refits = "certified refit" in getattr(SOLVERS[method](), "guarantee", "")
            found += [method] if refits else [method, f"{method}+least-squares"]
    return found


def ratios(method: str, posed: Sequence[LayerProblem], optima: Sequence[float]) -> Tensor:
    """Damped objective over its optimum for every problem; empty if not applicable.

    Drawn layers belong to no model, so there are no gradients of a loss.
    """
    steps = [SOLVERS[name]() for name in method.split("+")]
    reads_gradients = any("gradient" in requirements(step) for step in steps)
    if reads_gradients or not resolve(method).can_solve(posed[0]):
        return torch.empty(0, dtype=torch.float64)
    values = [
        float(objective_rows(problem, lw.solve(problem, method).weight, damped=True).sum())
        for problem in posed
    ]
    measured, best = (torch.tensor(v, dtype=torch.float64) for v in (values, optima))
    return measured / best


def scip_difference(problem: LayerProblem, row: int) -> float:
    """Optimum of a row by SCIP minus that by enumeration, over the row's energy."""
    alone = LayerProblem.from_moments(
        problem.weight[row : row + 1],
        problem.moments,
        pattern=problem.pattern,
        damping=problem.damping,
    )
    optimum = float(enumerated_optimum(alone)[0])
    return (scip_minimum(alone)[0] - optimum) / float(alone.energy)


def _cell(values: Tensor) -> str:
    if len(values) == 0:
        return "n/a"
    # the mean of the two middle values, where `median` takes the lower one
    figures = (values.mean(), values.quantile(0.5), values.max())
    return " / ".join(f"{float(figure):.3f}" for figure in figures)


def table(
    pattern: Pattern, chosen: Sequence[str], count: int, cross_checked: int
) -> tuple[list[str], float, float]:
    """Lines of the table of a pattern, its smallest ratio and SCIP's largest difference."""
    columns, smallest, difference = [], float("inf"), 0.0
    for spectrum in SPECTRA:
        posed = list(problems(spectrum, pattern, count))
        optima = [float(enumerated_optimum(problem)[0].sum()) for problem in posed]
        column = [ratios(method, posed, optima) for method in chosen]
        smallest = min([smallest, *(float(v.min()) for v in column if len(v))])
        columns.append([_cell(values) for values in column])
        for row in range(cross_checked):
            difference = max(difference, abs(scip_difference(posed[0], row)))
    lines = [
        f"| {pattern} | {' | '.join(SPECTRA)} |",
        "|---" * (len(SPECTRA) + 1) + "|",
        *(
            f"| {method} | {' | '.join(cells)} |"
            for method, cells in zip(chosen, zip(*columns, strict=True), strict=True)
        ),
    ]
    return lines, smallest, difference


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; a ratio below one, or a SCIP that disagrees, is the exit code."""
    parser = argparse.ArgumentParser(description="Methods against the best mask.")
    parser.add_argument("--solvers", nargs="+", help="methods, chains included; all")
    parser.add_argument("--problems", type=int, default=PROBLEMS, help="of every family")
    parser.add_argument(
        "--scip",
        type=int,
        default=CROSS_CHECKED,
        help="rows of a family solved by SCIP too",
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = options.solvers or methods()
    held = True
    for pattern in PATTERNS:
        lines, smallest, difference = table(pattern, chosen, options.problems, options.scip)
        held &= smallest >= 1 - ROUNDING and difference <= SCIP_REFERENCE
        lines.append(
            f"\nMean / median / largest of {options.problems} layers; smallest ratio "
            f"{smallest:.12f}; SCIP and enumeration differ by {difference:.0e} of the "
            "energy.\n"
        )
        sys.stdout.write("\n".join(lines) + "\n")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())

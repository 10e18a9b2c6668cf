r"""The best weights on columns that all rows share: one factorization for the layer.

With K the kept columns, G the damped gram and ``r = T - W_K G`` the residual of the dense
weights on K, every row takes the step ``r_K (G_KK)^-1``. With the same factor, the excess
of any weights on these columns is exactly ``r_K (G_KK)^-1 r_K^T``.

References
----------
.. [1] H. Hu, P. Zhao, P. Li, Y. Zheng, Z. Wang, X. Yuan, "FASP: Fast and Accurate
   Structured Pruning of Large Language Models", 2025, arXiv:2501.09412 (restoration).
"""

import torch
from torch import Tensor

from layerwise.certificates import bounded_energy, relative_excess
from layerwise.evaluate import residual, unclamped_from_residual
from layerwise.linalg import Factor, factorize
from layerwise.problem import LayerProblem
from layerwise.rounding import rounding_of_objective, size_of_terms
from layerwise.solution import Certificate

REFINEMENTS = 3
RELATIVE_TO = "damped optimum of the row on its mask"


def refit_columns(
    problem: LayerProblem,
    kept: Tensor,  # (in,) bool
    tolerance: float,
) -> tuple[Tensor, Certificate, float]:
    """Weights that minimise the damped objective on some columns, from the dense ones.

    Corrections in float64 are repeated until the excess of every row is below half the
    tolerance (iterative refinement). A row without residual keeps its bits. Cost:
    O(kept^3 / 3 + out kept^2), and the residuals.

    Parameters
    ----------
    problem
        The layer.
    kept
        Columns that keep their weights.
    tolerance
        Bound on the excess of every row, relative to its damped optimum.

    Returns
    -------
    tuple
        Weights (out, in) in the working precision, zero off the columns; their
        certificate; the damping that was used.
    """
    dense = problem.weight.double()
    weight = torch.where(kept, dense, 0)
    rest = residual(problem, weight)
    excess = torch.zeros_like(problem.energy)
    damping = problem.damping
    if bool(rest[:, kept].any()):
        moments = problem.moments
        gram = moments.gram[kept][:, kept]
        factor = factorize(gram, moments.mean_diagonal, damping, torch.float64)
        damping = factor.damping
        problem = problem.with_damping(damping)
        for _ in range(REFINEMENTS):
            weight[:, kept] += factor.solve_rows(rest[:, kept])
            weight = weight.to(problem.dtype).double()
            rest = residual(problem, weight)
            excess = _relative_excess(problem, weight, rest, kept, factor)
            if bool((excess <= tolerance / 2).all()):
                break
    certificate = Certificate("refit", float(excess.max()), RELATIVE_TO)
    return weight.to(problem.dtype), certificate, damping


def _relative_excess(
    problem: LayerProblem, weight: Tensor, rest: Tensor, kept: Tensor, factor: Factor
) -> Tensor:
    """Excess of every row with its rounding, relative to its damped optimum, (out,)."""
    size = size_of_terms(problem, weight)
    least = unclamped_from_residual(problem, weight, rest)
    least = least - rounding_of_objective(problem, size)
    return relative_excess(problem, least, bounded_energy(factor, rest[:, kept], size))

r"""Rounding errors of residuals and objectives, which certificates add to their bounds.

The moments define the problem, and count as exact. What is computed from them in float64 is
rounded: the shift ``S = W (C - G)``, residuals and objectives. With g the diagonal of the
damped gram, all these errors are measured by one number per row, the squared `size` of the
terms that are added up. By the inequality of Cauchy and Schwarz,

.. math:: \sum_k |W_k D_{kj}| \le \sqrt{\sum_k W_k^2 g_k} \sqrt{\sum_k D_{kj}^2 / g_k},
          \quad D = C - G,

so the rounding of the shift costs no product. It counts where weights are large in
directions in which the gram is singular: the shift is small there, and its terms are not.

References
----------
.. [1] N. Higham, T. Mary, "A New Approach to Probabilistic Rounding Error Analysis",
   SIAM J. Scientific Computing 2019: the error of a sum of n terms is some sqrt(n) eps.
"""

import torch
from torch import Tensor

from layerwise.chunks import slabs
from layerwise.evaluate import unclamped_rows
from layerwise.problem import LayerProblem

EPSILON = torch.finfo(torch.float64).eps
ROUNDING = 4.0  # times the root of the width: rounding errors of random signs, added [1]_
LEAST_CHANNEL = 1e-8  # of the mean of g: smaller weights of the inequality help nothing


def damped_diagonal(problem: LayerProblem) -> Tensor:
    """Diagonal g of the damped gram, shape (in,)."""
    return problem.gram.diagonal() + problem.ridge


def size_of_terms(problem: LayerProblem, weight: Tensor) -> Tensor:
    """Squared size of the terms of a residual, in units of the gram's diagonal g, (out,).

    The size is ``(W - w)^2 g``. If the two models see different inputs, the shift is added,
    and the terms from which the shift and the drift were computed.
    """
    change = problem.weight.double() - weight.double()
    size = change.square_() @ damped_diagonal(problem)
    if problem.shift is not None:
        size += size_of_rows(problem, problem.shift)
        size += size_of_shift(problem)
    return size


def size_of_rows(problem: LayerProblem, rows: Tensor) -> Tensor:
    """Squared size ``r^2 / g`` of further terms r of a residual, (out,)."""
    diagonal = damped_diagonal(problem)
    size: Tensor = rows.square() @ torch.where(diagonal > 0, 1 / diagonal, 0)
    return size


def size_of_shift(problem: LayerProblem) -> Tensor:
    """Squared size of the terms of the shift and of the drift, (out,)."""
    parts, dense = _squared_terms(problem)
    ratio = parts / damped_diagonal(problem)
    spread = torch.where(parts > 0, ratio, 0).max()
    return dense * (1 + spread)


def terms_of_shift(problem: LayerProblem) -> Tensor:
    """Bound on the sums of absolute terms of the shift, (out, in), and on the shift."""
    parts, dense = _squared_terms(problem)
    return dense.sqrt()[:, None] * parts.sqrt()


def _squared_terms(problem: LayerProblem) -> tuple[Tensor, Tensor]:
    """Sums ``D_kj^2 / g_k`` of every column j, (in,), and ``W_k^2 g_k`` of every row.

    Any positive g gives a valid inequality. Channels without inputs take a small one.
    """
    diagonal = damped_diagonal(problem)
    diagonal = diagonal.clamp(min=LEAST_CHANNEL * float(diagonal.mean()))

    def make() -> Tensor:
        result = torch.zeros_like(diagonal)
        for columns in slabs(len(diagonal)):
            apart = problem.cross_gram[:, columns] - problem.gram[:, columns]
            result[columns] = (1 / diagonal) @ apart.square_()
        return result

    parts = problem.moments.shared(("terms of the shift", problem.damping), make)
    dense: Tensor = problem.weight.double().square() @ diagonal
    return parts, dense


def rounding_of_objective(problem: LayerProblem, size: Tensor) -> Tensor:
    """Bound on the rounding of the damped objective of rows of a given size, (out,)."""
    width = problem.shape[1]
    return ROUNDING * EPSILON * (width * size + problem.drift.abs())


def objective_bounds(problem: LayerProblem, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Damped objective of every row, which rounding can make negative, and its rounding."""
    value = unclamped_rows(problem, weight, damped=True)
    return value, rounding_of_objective(problem, size_of_terms(problem, weight))

r"""Choice of supports or complements for fewer iterations, by the spread of eigenvalues.

The spread of a positive definite matrix A of size n is its mean squared eigenvalue over
its squared mean eigenvalue,

.. math:: s(A) = n \operatorname{tr} A^2 / (\operatorname{tr} A)^2 \ge 1 ,

one if all are equal. The iterations of conjugate gradients on a share u of the unknowns
grow with s(A) and with u. On captured spectra, the ratio of ``s(A) u^1.5`` on the two sides
is close to the ratio of their iterations: ``python -m tests.benchmarks.refit_race --sides``
prints both.
"""

import torch
from torch import Tensor

from layerwise.problem import LayerProblem
from layerwise.solvers.refit.factor_model import FactorModel

EXPONENT = 1.5
MODEL_COST = 1.25  # of an iteration with the model of the gram, over one without


def complement_is_easier(problem: LayerProblem, mask: Tensor, rank: int) -> bool:
    """Whether the systems on complements are expected to take less time."""
    cost = MODEL_COST if rank > 0 else 1.0
    return cost * ratio_of_iterations(problem, mask, rank) >= 1


def ratio_of_iterations(problem: LayerProblem, mask: Tensor, rank: int) -> float:
    """Expected iterations on the supports over those on the complements.

    Parameters
    ----------
    problem
        The layer, at the damping at which its gram factors.
    mask
        True = kept, shape (out, in), not all True.
    rank
        Rank of the model that preconditions on the supports.
    """
    kept = float(mask.sum()) / mask.numel()
    shares: float = (kept / (1 - kept)) ** EXPONENT
    return shares * spread_on_supports(problem, rank) / spread_on_complements(problem)


def spread_on_supports(problem: LayerProblem, rank: int) -> float:
    """Spread of the gram of unit diagonal without the directions of its model; cached.

    Cost: as :meth:`FactorModel.of`.
    """

    def make() -> float:
        fits = problem.factor(torch.float64).fits(torch.float32)
        gram = problem.damped_gram(torch.float32 if fits else torch.float64)
        root = gram.diagonal().sqrt()
        gram /= root
        gram /= root[:, None]
        model = FactorModel.of(gram, rank)
        leading = model.values.double() + model.level
        left, rest = len(gram) - model.rank, len(gram) - float(leading.sum())
        if left == 0 or rest <= 0:
            return 1.0
        squares = float(gram.square_().sum(dtype=torch.float64) - leading.square().sum())
        return max(left * squares / rest**2, 1.0)

    return problem.moments.shared(("spread", problem.damping, rank), make)


def spread_on_complements(problem: LayerProblem) -> float:
    """Spread of the inverse of the gram of unit diagonal; cached with its factor."""
    trace, squares = problem.factor(torch.float64).unit_inverse
    return problem.shape[1] * squares / trace**2

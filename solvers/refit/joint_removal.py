r"""Joint removal of many weights of a row: the closed form of the best compensation.

Let w be the unconstrained minimiser of a row, so that the objective of any v is
``(v - w) G (v - w)^T`` above its minimum, and let P be the weights to remove. The best
change of the row is

.. math:: \delta = -w_P \big[(G^{-1})_{PP}\big]^{-1} (G^{-1})_{P,:},
          \qquad \text{loss} = w_P \big[(G^{-1})_{PP}\big]^{-1} w_P^\top .

With a single weight in P, this is the optimal brain surgeon. Weights are selected by index,
never by value, so a weight that is already zero counts like any other.

References
----------
.. [1] P. Zhao et al., "Pruning Foundation Models for High Accuracy without Retraining",
   Findings of EMNLP 2024, arXiv:2410.15567, section 3 (the multiple removal problem).
"""

import torch
from torch import Tensor

from layerwise.errors import MemoryBudgetError
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.refit.row_systems import solve_on_supports


def remove_jointly(
    weight: Tensor,  # (rows, in)
    inverse: Tensor,  # (in, in)
    mask: Tensor,  # (rows, in)
    memory_budget: int = LeastSquares.memory_budget,
) -> tuple[Tensor, Tensor]:  # (rows, in), (rows,)
    """Remove the entries off the mask with the best compensation.

    Parameters
    ----------
    weight
        Unconstrained minimiser: the dense weight if both models see the same inputs.
    inverse
        Inverse of the damped gram.
    mask
        True = kept.
    memory_budget
        Bytes for the row systems.

    Returns
    -------
    tuple
        Weights of shape (rows, in), exactly zero off the mask, and the increase of the
        damped objective over its minimum, shape (rows,).
    """
    pull = multipliers(weight, inverse, mask, memory_budget)
    compensated = torch.where(mask, weight - pull @ inverse, 0)
    return compensated, (pull * weight).sum(dim=1)


def multipliers(
    weight: Tensor,  # (rows, in)
    inverse: Tensor,  # (in, in)
    mask: Tensor,  # (rows, in)
    memory_budget: int = LeastSquares.memory_budget,
) -> Tensor:  # (rows, in)
    """``w_P [(G^-1)_PP]^-1`` of every row, zero on kept weights.

    Rows are solved in chunks. Cost: O(removed^3 / 3) per row.

    Parameters
    ----------
    weight, inverse, mask, memory_budget
        See :func:`remove_jointly`.

    Raises
    ------
    MemoryBudgetError
        If the system of one row does not fit the memory budget.
    """
    removed = ~mask
    largest = int(removed.sum(dim=1).amax())
    per_row = max(1, 3 * largest**2 * inverse.dtype.itemsize)
    chunk = memory_budget // per_row
    if chunk < 1:
        message = (
            f"one row of this removal needs {per_row} bytes, the memory budget is "
            f"{memory_budget}; raise it"
        )
        raise MemoryBudgetError(message)
    parts = zip(torch.split(weight, chunk), torch.split(removed, chunk), strict=True)
    return torch.cat([solve_on_supports(inverse, off)(part) for part, off in parts])

"""The damped problem that stored moments define, in ball arithmetic.

A ball is a number of 400 bits with a proven bound on its error, from python-flint. Tensors
enter exactly. A comparison of balls is true only if it is true for all numbers in them.
"""

from collections.abc import Sequence

import torch
from flint import arb, arb_mat, ctx
from torch import Tensor

from layerwise.problem import LayerProblem

ctx.prec = 400


def balls(matrix: Tensor) -> arb_mat:
    """Matrix of exact balls."""
    return arb_mat([[arb(value) for value in row] for row in matrix.double().tolist()])


class ExactProblem:
    """Rows of ``f(w) = w H w - 2 w T + c`` with the damped gram H, without any rounding.

    Parameters
    ----------
    problem
        Its stored gram, cross-gram, drift and damping are taken as exact numbers.
    """

    def __init__(self, problem: LayerProblem) -> None:
        plain, weight = balls(problem.gram), balls(problem.weight)
        ridge = arb(problem.damping) * arb(problem.moments.mean_diagonal)
        self.gram = balls(problem.gram)
        for index in range(len(problem.gram)):
            self.gram[index, index] += ridge
        of_gram = weight * self.gram
        shift = weight * (balls(problem.cross_gram) - plain)
        self.target = of_gram + shift
        self._weight, self._ends = weight, of_gram + 2 * shift
        self._drift = problem.drift.tolist()
        self.width = len(problem.gram)

    def constant(self, row: int) -> arb:
        """Value of a row of zeros."""
        start = arb(self._drift[row])
        return sum(
            (self._weight[row, j] * self._ends[row, j] for j in range(self.width)), start
        )

    def value(self, row: int, weights: Sequence[arb]) -> arb:
        """Damped objective of a row."""
        vector = arb_mat([list(weights)])
        image = vector * self.gram
        total = self.constant(row)
        for j, weight in enumerate(weights):
            total += weight * (image[0, j] - 2 * self.target[row, j])
        return total

    def slope(self, row: int, weights: Sequence[arb]) -> list[arb]:
        """``T - w H`` of a row: minus half the gradient."""
        image = arb_mat([list(weights)]) * self.gram
        return [self.target[row, j] - image[0, j] for j in range(self.width)]

    def best(
        self, row: int, kept: Sequence[int], pull: Sequence[float] | None = None
    ) -> list[arb] | None:
        """Minimiser of ``f(w) + 2 <pull, w>`` on a support, or None if there is none."""
        weights = [arb(0)] * self.width
        if not kept:
            return weights
        system = arb_mat([[self.gram[i, j] for j in kept] for i in kept])
        pulls = [0.0] * len(kept) if pull is None else pull
        rhs = [
            [self.target[row, i] - arb(force)] for i, force in zip(kept, pulls, strict=True)
        ]
        try:
            solved = system.solve(arb_mat(rhs))
        except ZeroDivisionError:
            return None
        for place, index in enumerate(kept):
            weights[index] = solved[place, 0]
        return weights

    def least(self, row: int, kept: Sequence[int]) -> arb | None:
        """Smallest objective of a row on a support."""
        weights = self.best(row, kept)
        if weights is None:
            return None
        total = self.constant(row)
        for index in kept:
            total -= weights[index] * self.target[row, index]
        return total


def exactly(values: Tensor) -> list[arb]:
    """One row of a tensor as exact balls."""
    return [arb(value) for value in values.double().tolist()]


def middle(ball: arb) -> float:
    """Nearest float."""
    return float(ball.mid())


def screened(problem: LayerProblem, masks: Tensor) -> Tensor:  # (rows, masks)
    """Smallest objective on every mask (masks, in), up to a constant per row, in float64.

    Only to choose the masks whose minimum is worth computing exactly.
    """
    gram = problem.damped_gram(torch.float64)
    target = problem.weight.double() @ gram
    if problem.shift is not None:
        target = target + problem.shift
    both = masks[:, :, None] & masks[:, None, :]
    eye = torch.eye(len(gram), dtype=torch.float64)
    inverse = torch.linalg.inv_ex(torch.where(both, gram, eye))[0]
    rhs = torch.where(masks[None], target[:, None], 0)
    gains = torch.einsum("rmi,mij,rmj->rm", rhs, inverse, rhs)
    return (-gains).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)

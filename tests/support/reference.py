"""Reference answers that share no code with the solvers under test.

Everything starts from W, X and Xhat: the damped objective of a row is the sum of squares
``||A v - b||^2`` with the tokens and the ridge stacked as equations. Convex problems go to
CLARABEL, masks are enumerated, and n:m on wider rows goes to SCIP.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import cvxpy
import numpy as np
import torch
from torch import Tensor

from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from tests.support.problems import Layer
from tests.support.tolerances import CLARABEL_OPTIONS

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Equations:
    """The damped problem of a layer as stacked equations ``A V^T = B``."""

    layer: Layer
    damping: float = 0.01

    @property
    def ridge(self) -> float:
        """``damping * mean(diag(Xhat Xhat^T)) / tokens``."""
        seen = self.layer.seen.double()
        return self.damping * float(seen.square().sum()) / seen.numel()

    @cached_property
    def left(self) -> Array:
        """A, shape (tokens + in, in)."""
        seen = self.layer.seen.double().numpy()
        width, tokens = seen.shape
        return np.vstack([seen.T / tokens**0.5, self.ridge**0.5 * np.eye(width)])

    @cached_property
    def right(self) -> Array:
        """B, shape (tokens + in, out)."""
        weight, inputs = self.layer.weight.double(), self.layer.inputs.double()
        outputs = (weight @ inputs).numpy().T / inputs.shape[1] ** 0.5
        return np.vstack([outputs, self.ridge**0.5 * weight.numpy().T])

    def objective_rows(self, weight: Array) -> Array:
        """Damped objective of every row."""
        rows: Array = np.square(self.left @ weight.T - self.right).sum(axis=0)
        return rows

    def objective(self, weight: Tensor) -> float:
        """Damped objective of the layer."""
        return float(self.objective_rows(weight.double().numpy()).sum())

    def least_squares(self, mask: Tensor) -> Array:
        """Best weights on a mask, row by row, by an orthogonal factorization."""
        weight = np.zeros(self.layer.shape)
        for row, kept in enumerate(mask.numpy()):
            solved = np.linalg.lstsq(self.left[:, kept], self.right[:, row], rcond=None)
            weight[row, kept] = solved[0]
        return weight

    def clarabel_refit(self, mask: Tensor) -> Array:
        """Best weights on a mask, by an interior-point solver."""
        weight = np.zeros(self.layer.shape)
        rows = [row for row, kept in enumerate(mask.numpy()) if kept.any()]
        free = {row: cvxpy.Variable(int(mask[row].sum())) for row in rows}
        errors = [
            self.left[:, mask[row].numpy()] @ free[row] - self.right[:, row] for row in rows
        ]
        _minimize(cvxpy.sum_squares(cvxpy.hstack(errors)))
        for row in rows:
            weight[row, mask[row].numpy()] = free[row].value
        return weight

    def clarabel_l1(self, penalty: float) -> float:
        """Minimum of the damped objective plus the l1 penalty, from above."""
        free = cvxpy.Variable(self.layer.shape)
        error = self.left @ free.T - self.right
        size = cvxpy.sum(cvxpy.abs(free))
        _minimize(cvxpy.sum_squares(error) + penalty * size)
        weight = np.asarray(free.value, dtype=np.float64)
        return float(self.objective_rows(weight).sum() + penalty * np.abs(weight).sum())

    def enumerated_minimum(self, pattern: Pattern) -> float:
        """Minimum over all masks of the pattern; for at most ten inputs."""
        rows, width = self.layer.shape
        assert width <= 10
        if isinstance(pattern, Unstructured) and pattern.group == "layer":
            kept = rows * width - pattern.removed(rows * width)
            best = np.array([0.0] + [np.inf] * kept)  # by the number of kept so far
            for row in range(rows):
                of_row = [
                    min(
                        self._row(row, support) for support in combinations(range(width), k)
                    )
                    for k in range(width + 1)
                ]
                best = np.array(
                    [
                        min(
                            best[count - k] + of_row[k]
                            for k in range(min(width, count) + 1)
                        )
                        for count in range(kept + 1)
                    ]
                )
            return float(best[kept])
        supports = _row_supports(pattern, width)
        return sum(
            min(self._row(row, support) for support in supports) for row in range(rows)
        )

    def _row(self, row: int, support: tuple[int, ...]) -> float:
        side = self.right[:, row]
        if not support:
            return float(side @ side)
        solved = np.linalg.lstsq(self.left[:, support], side, rcond=None)[0]
        return float(np.square(self.left[:, support] @ solved - side).sum())


def hessian_and_start(layer: Layer, damping: float) -> tuple[Tensor, Tensor]:
    """Damped gram and unconstrained minimiser by their definitions, in float64."""
    seen, inputs, dense = layer.seen.double(), layer.inputs.double(), layer.weight.double()
    gram = seen @ seen.T / seen.shape[1]
    ridge = damping * gram.diagonal().mean()
    gram = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    target = dense @ (inputs @ seen.T / seen.shape[1]) + ridge * dense
    return gram, torch.linalg.solve(gram, target, left=False)


def _minimize(expression: Any) -> None:
    model = cvxpy.Problem(cvxpy.Minimize(expression))
    model.solve(solver=cvxpy.CLARABEL, **CLARABEL_OPTIONS)
    assert model.status == cvxpy.OPTIMAL


def _row_supports(pattern: Pattern, width: int) -> list[tuple[int, ...]]:
    if isinstance(pattern, Unstructured):
        return list(combinations(range(width), width - pattern.removed(width)))
    assert isinstance(pattern, NM)
    supports: list[tuple[int, ...]] = [()]
    for begin in range(0, width, pattern.m):
        group = list(combinations(range(begin, begin + pattern.m), pattern.n))
        supports = [left + right for left in supports for right in group]
    return supports


def scip_minimum(problem: LayerProblem) -> tuple[float, Tensor]:
    """Minimum of a pattern's damped objective by branch and bound, and its mask."""
    assert not isinstance(problem.pattern, FixedMask)
    model: Any = problem.to_cvxpy()
    model.solve(solver=cvxpy.SCIP)
    assert model.status == cvxpy.OPTIMAL
    mask = next(variable for variable in model.variables() if variable.name() == "mask")
    return float(model.value), torch.from_numpy(mask.value > 1 / 2)

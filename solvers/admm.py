r"""ADMM: weights and mask in turn, with one factorization.

In scaled variables ``Z = W D``, ``D = diag(G)^(1/2)``, the damped gram has a unit
diagonal, ``Gs = D^-1 G D^-1``. Splitting the weights from their sparse copy gives

    W <- (Ts + rho Z - V) (Gs + rho I)^-1,   Z <- (W + V / rho) on its mask,
    V <- V + rho (W - Z),

with Ts the scaled target and V the multiplier. Two published variants:

- ``admm`` [1]_: 20 steps with rho = 1 and damping 0.1. The first 15 steps refresh the mask,
  at a sparsity that grows as ``s - s (1 - t / 15)^3``.
- ``alps`` [2]_: rho grows with the number of support entries that still change. A few
  conjugate gradient steps on the final support follow.

References
----------
.. [1] V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models",
   TMLR 2024, arXiv:2401.02938, algorithms 1 and 2.
.. [2] X. Meng, K. Behdin, H. Wang, R. Mazumder, "ALPS: Improved Optimization for Highly
   Sparse One-Shot Pruning for Large Language Models", NeurIPS 2024, arXiv:2406.07831,
   algorithms 1 and 2.

Notes
-----
Deviations: (1) any gram and cross-gram; (2) ``alps`` takes the mask of the sparse copy,
where the published program takes the mask of W at the end; (3) ``alps`` finishes with the
exact refit where the published program stops after ten steps (`finish="cg"`).
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.patterns import FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.options import check_at_least, check_positive
from layerwise.solvers.refit.polish import polish

Finish = Literal["exact", "cg"]

RHO_EVERY = 3  # steps between two changes of rho
LARGE_CHANGE, MEDIUM_CHANGE, SMALL_CHANGE = 0.1, 0.005, 3e-4  # shares of the support
LEAST_STEPS = 30  # before a small change ends the iteration
LARGEST_RHO = 1e6
SMALL_RHO = 1e-3  # below it, inverses are computed in float64
FINISH_ITERATIONS = 10


class Scaled:
    """The damped problem in variables in which its gram has a unit diagonal."""

    def __init__(self, problem: LayerProblem) -> None:
        dtype = problem.dtype
        gram = problem.damped_gram(dtype)
        self._root = gram.diagonal().sqrt()
        self.gram = gram / self._root / self._root[:, None]
        self._weight = problem.weight.to(dtype)
        self.dense = self._weight * self._root
        shift = problem.shift
        self._shift = None if shift is None else shift.to(dtype) / self._root

    def inverse(self, rho: float) -> Tensor:
        """``(Gs + rho I)^-1``, in the precision of the problem."""
        wide = self.gram.dtype == torch.float64 or rho < SMALL_RHO
        raised = self.gram.to(torch.float64 if wide else torch.float32, copy=True)
        raised.diagonal().add_(rho)
        lower, failed = torch.linalg.cholesky_ex(raised)
        if int(failed):  # singular up to rounding: eigenvalues below zero count as zero
            values, vectors = torch.linalg.eigh(self.gram.double())
            inverse: Tensor = (vectors / (values.clamp(min=0) + rho)) @ vectors.T
        else:
            inverse = torch.cholesky_inverse(lower)
        return inverse.to(self.gram.dtype)

    def weights_step(self, pull: Tensor, inverse: Tensor) -> Tensor:
        """``(Ts + pull + rho dense) inverse``, written around the dense weight.

        `pull` is ``rho (Z - dense) - V``; where it is zero and both models see the same
        inputs, the result is the dense weight to the bit.
        """
        if self._shift is not None:
            pull = pull + self._shift
        return torch.addmm(self.dense, pull, inverse)

    def residual(self, scaled: Tensor) -> Tensor:
        """``Ts - scaled Gs``."""
        result = (self.dense - scaled) @ self.gram
        return result if self._shift is None else result + self._shift

    def unscaled(self, scaled: Tensor, mask: Tensor) -> Tensor:
        """Weights in the original variables, zero off the mask."""
        weight = self._weight + (scaled - self.dense) / self._root
        return torch.where(mask, weight, 0)


@dataclass(frozen=True)
class ADMM:
    """ADMM: a fixed number of steps with a mask that becomes sparser step by step.

    Cost: one inverse O(in^3) and a product O(2 out in^2) a step.

    Parameters
    ----------
    damping
        Relative ridge of this method, which replaces the damping of the problem.
    rho
        Weight of the splitting, in units of the scaled diagonal.
    iterations
        Number of steps.
    mask_iterations
        Steps that refresh the mask, at most `iterations`.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    guarantee: ClassVar[str] = "none"
    name: str = "admm"
    damping: float = 0.1
    rho: float = 1.0
    iterations: int = 20
    mask_iterations: int = 15

    def __post_init__(self) -> None:
        check_at_least(self, damping=0, iterations=0, mask_iterations=0)
        check_positive(self, "rho")

    def can_solve(self, problem: LayerProblem) -> bool:
        """Every pattern; for a fixed mask only the weights are updated."""
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Alternate from the dense weight."""
        own = problem.with_damping(self.damping)
        damping = own.factor().damping
        scaled = Scaled(own.with_damping(damping))
        inverse = scaled.inverse(self.rho)
        mask = problem.pattern.mask(scaled.dense.abs())
        center = scaled.dense
        refreshes = min(self.mask_iterations, self.iterations)
        for step in range(1, self.iterations + 1):
            if step <= refreshes:
                pattern = _gradual(problem.pattern, step / refreshes)
                mask = pattern.mask(center.abs())
            # copy - V / rho is the center on the mask, and minus the center off it
            pull = torch.where(mask, center, -center).sub_(scaled.dense).mul_(self.rho)
            weight = scaled.weights_step(pull, inverse)
            center = torch.where(mask, weight, weight + center)
        sparse = scaled.unscaled(center, mask)
        return Answer(
            sparse,
            mask,
            iterations=self.iterations,
            stats={"damping": damping},
        )


@dataclass(frozen=True)
class ALPS:
    """ALPS: ADMM whose rho follows the changes of the support, then a refit.

    Cost: a product O(2 out in^2) a step, an inverse O(in^3) every third step, and the
    refit.

    Parameters
    ----------
    rho
        First weight of the splitting.
    iterations
        Largest number of steps.
    finish
        ``"exact"`` refits to a certificate; ``"cg"`` takes the published ten steps.
    memory_budget
        Bytes for the row systems of the refit.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram"})
    name: str = "alps"
    rho: float = 0.1
    iterations: int = 300
    finish: Finish = "exact"
    memory_budget: int = LeastSquares.memory_budget

    def __post_init__(self) -> None:
        check_at_least(self, iterations=0)
        check_positive(self, "rho")
        if self.finish not in get_args(Finish):
            message = f"finish is one of {', '.join(get_args(Finish))}, got {self.finish!r}"
            raise UsageError(message)

    @property
    def guarantee(self) -> str:
        """Guarantee of the answer, in words."""
        return "certified refit" if self.finish == "exact" else "none"

    def can_solve(self, problem: LayerProblem) -> bool:
        """Every pattern; for a fixed mask only the weights are found."""
        return True

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Alternate until the support no longer changes, then refit."""
        refit = LeastSquares(memory_budget=self.memory_budget)
        fixed = isinstance(problem.pattern, FixedMask)
        if fixed and self.finish == "exact":
            return refit.solve(problem)
        problem, _ = problem.factorized()
        scaled = Scaled(problem)
        mask, copy, steps = self._alternate(problem.pattern, scaled)
        stats = {"damping": problem.damping}
        if self.finish == "exact":
            weight = scaled.unscaled(copy, mask)
            return replace(refit.refit(problem, weight, mask), iterations=steps)
        change = polish(scaled.gram, mask, scaled.residual(copy), FINISH_ITERATIONS)
        weight = scaled.unscaled(copy + change, mask)
        return Answer(weight, mask, iterations=steps, stats=stats)

    def find(self, problem: LayerProblem) -> Tensor:
        """Return the final mask of the alternation, without the refit."""
        problem, _ = problem.factorized()
        return self._alternate(problem.pattern, Scaled(problem))[0]

    def _alternate(self, pattern: Pattern, scaled: Scaled) -> tuple[Tensor, Tensor, int]:
        """Return the final mask, the sparse copy and the number of steps."""
        rho, grown = self.rho, False
        inverse = scaled.inverse(rho)
        first = pattern.mask(scaled.dense.abs())
        copy = torch.where(first, scaled.dense, 0)
        dual = torch.zeros_like(copy)
        mask, last, step = first, first, 0
        for step in range(1, self.iterations + 1):
            pull = torch.sub(copy, scaled.dense).mul_(rho).sub_(dual)
            center = scaled.weights_step(pull, inverse).add_(dual, alpha=1 / rho)
            mask = pattern.mask(center.abs())
            copy = center * mask
            dual = (center - copy).mul_(rho)
            if step % RHO_EVERY or step == self.iterations:
                continue
            changed = int((mask & ~last).sum())
            share, last = changed / max(int(mask.sum()), 1), mask
            if changed == 0 and grown:
                break
            if step >= LEAST_STEPS and share < SMALL_CHANGE:
                break
            if share > LARGE_CHANGE:
                rho, grown = min(rho * 1.3, LARGEST_RHO), True
            elif share > MEDIUM_CHANGE:
                rho, grown = min(rho * 1.2, LARGEST_RHO), True
            elif changed and grown:
                rho = min(rho * 1.1, LARGEST_RHO)
            else:  # no change although rho has not grown: it started too large
                rho /= 5
                copy, last = torch.where(first, scaled.dense, 0), first
                dual = torch.zeros_like(copy)
            inverse = scaled.inverse(rho)
        return mask, copy, step


def _gradual(pattern: Pattern, progress: float) -> Pattern:
    """Pattern at progress t, with the sparsity ``s - s (1 - t)^3``."""
    if isinstance(pattern, Unstructured):
        return replace(pattern, sparsity=pattern.sparsity * (1 - (1 - progress) ** 3))
    return pattern

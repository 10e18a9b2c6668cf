r"""MaskLoRA of one layer: a low-rank change on a fixed mask, from the moments alone.

Problem, with W0 the pruned weight, M its mask and G, ridge as in the layer problem:

    min over B (out, r), A (r, in) of
        ||W X - (W0 + M * (B A)) Xhat||^2 / tokens + ridge ||W - W0 - M * (B A)||^2

This is the exact refit restricted to changes of rank r. So its objective is never below the
one of ``least-squares``, and reaches it as r grows. The published method runs AdamW on the
inputs. For one layer, the gradient needs only the gram, and both factors can be found in a
better way:

1. A starts as the leading right singular vectors of the masked residual ``M * R``, B = 0.
2. B for fixed A is exact, row by row: ``K_i b_i = A_i r_i`` with ``A_i = A diag(m_i)`` and
   the (r, r) matrix ``K_i = A_i G A_i^T``.
3. A for fixed, orthonormal B by conjugate gradients, one masked product a step.
4. Repeat until the objective falls by less than the tolerance. It never rises.

References
----------
.. [1] M. Zimmer, M. Andoni, C. Spiegel, S. Pokutta, "PERP: Rethinking the Prune-Retrain
   Paradigm in the Era of LLMs", arXiv:2312.15230, section 2.2 (MaskLoRA).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from layerwise.certificates import refit_certificate
from layerwise.evaluate import residual
from layerwise.patterns import FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import Answer, Start
from layerwise.solver import OnIteration
from layerwise.solvers.options import check_at_least

JITTER = 1e-12  # of the mean of diag(K), for rows with fewer kept weights than the rank


@dataclass(frozen=True)
class MaskLoRA:
    """Best low-rank change of the weights on a :class:`FixedMask`, by alternation.

    Cost per sweep: O((rank + inner) out in^2), float64. The certificate bounds the distance
    from the exact refit on the same mask.

    Parameters
    ----------
    rank
        Rank r, at most the smaller side of the weight.
    sweeps
        Largest number of alternations.
    inner
        Conjugate gradient steps on A per sweep.
    tolerance
        Stop when a sweep gains less than this share of the objective's fall so far.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram", "mask"})
    guarantee: ClassVar[str] = "certified excess over the refit"
    name: str = "masklora"
    rank: int = 16
    sweeps: int = 50
    inner: int = 10
    tolerance: float = 1e-4

    def __post_init__(self) -> None:
        check_at_least(self, rank=1, sweeps=1, inner=1, tolerance=0)

    def can_solve(self, problem: LayerProblem) -> bool:
        """Only a fixed mask."""
        return isinstance(problem.pattern, FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Start | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Answer:
        """Change the weights of `initial`, or the dense ones, on the mask."""
        mask = problem.pattern.mask(problem.weight)
        damping = problem.factor(torch.float64).damping
        problem = problem.with_damping(damping)
        start = problem.weight if initial is None else initial.weight
        weight = torch.where(mask, start.double(), 0)
        system = _System(
            problem.damped_gram(torch.float64), mask, residual(problem, weight) * mask
        )
        rank = min(self.rank, *problem.shape)
        right = torch.linalg.svd(system.target, full_matrices=False).Vh[:rank]
        left = system.target.new_zeros(len(weight), rank)
        history: list[dict[str, float]] = []
        gained = 0.0
        for _ in range(self.sweeps):
            left = system.best_left(right)
            basis, rest = torch.linalg.qr(left)
            right = system.better_right(basis, rest @ right, self.inner)
            left = basis
            gain = system.gain(left, right)
            history.append({"gain": gain})
            if on_iteration is not None:
                on_iteration(history[-1])
            if gain - gained <= self.tolerance * gain:
                break
            gained = gain
        weight += mask * (left @ right)
        weight = weight.to(problem.dtype)
        return Answer(
            weight,
            mask,
            certificate=refit_certificate(problem, weight, mask),
            iterations=len(history),
            history=tuple(history),
            stats={"damping": damping},
        )


class _System:
    """The quadratic ``<D G, D> - 2 <R, D>`` of a masked change ``D = M * (B A)``."""

    def __init__(self, gram: Tensor, mask: Tensor, target: Tensor) -> None:
        self._gram, self._mask, self.target = gram, mask, target

    def gain(self, left: Tensor, right: Tensor) -> float:
        """Decrease of the damped objective."""
        change = self._mask * (left @ right)
        return float(((2 * self.target - change @ self._gram) * change).sum())

    def best_left(self, right: Tensor) -> Tensor:
        """Exact B for fixed A, shape (out, rank)."""
        rank = len(right)
        masked = [self._mask * row for row in right]  # `rank` matrices (out, in)
        systems = right.new_empty(len(self._mask), rank, rank)
        for index, row in enumerate(masked):
            image = row @ self._gram
            for other in range(index + 1):
                entry = (image * masked[other]).sum(dim=1)
                systems[:, index, other] = systems[:, other, index] = entry
        diagonal = systems.diagonal(dim1=1, dim2=2)
        diagonal += JITTER * diagonal.mean(dim=1, keepdim=True) + torch.finfo().tiny
        rhs = self.target @ right.T  # the target is zero off the mask
        factors = torch.linalg.cholesky(systems)
        return torch.cholesky_solve(rhs[:, :, None], factors)[:, :, 0]

    def better_right(self, left: Tensor, right: Tensor, steps: int) -> Tensor:
        """Conjugate gradient steps on A for fixed B, shape (rank, in)."""

        def apply(values: Tensor) -> Tensor:
            change = self._mask * (left @ values)
            return left.T @ (self._mask * (change @ self._gram))

        scale = self._gram.diagonal()
        rest = left.T @ self.target - apply(right)
        direction = rest / scale
        size = (rest * direction).sum()
        for _ in range(steps):
            image = apply(direction)
            curvature = (direction * image).sum()
            if not bool(curvature > 0):
                break
            step = size / curvature
            right = right + step * direction
            rest = rest - step * image
            preconditioned = rest / scale
            next_size = (rest * preconditioned).sum()
            direction = preconditioned + next_size / size * direction
            size = next_size
        return right

r"""Exact refit: the best weights on a fixed mask, every row certified.

Row i with support S minimises the damped objective over vectors that vanish outside S;
the change d from any starting point solves ``d_S G_SS = r_S`` with r the residual
``T - w G``. Two inner solvers find d, in the precision in which the gram factors:

- direct: gather ``G_SS`` of many rows and factor them as one batch, O(kept^3 / 3) a row;
- cg: conjugate gradients on all rows at once with the diagonal as preconditioner, one
  product O(2 in^2) a row and iteration.

Residuals are float64, and each correction repeats until the certificate
``||L^-1 r||^2`` of every row is below the tolerance (iterative refinement). Starting at
the dense weight, a full mask returns it bit for bit.

References
----------
.. [1] V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models",
   TMLR 2024, arXiv:2401.02938 (the problem with a fixed mask).
.. [2] X. Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
   Large Language Models", NeurIPS 2024, arXiv:2406.07831, section 3.3 (conjugate
   gradients over all rows).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from layerwise.certificates import refit_certificate, refit_excess
from layerwise.errors import MemoryBudgetError
from layerwise.evaluate import evaluate, residual
from layerwise.patterns import FixedMask
from layerwise.problem import LayerProblem
from layerwise.solution import OnIteration, Solution, Status

Correction = Callable[[Tensor], Tensor]  # residual (rows, in) -> change (rows, in)

REFINEMENTS = 6
EXPECTED_ITERATIONS = 120  # of cg, for the choice by cost
BATCH_EFFICIENCY = 4  # a flop of a batched factorization takes this many of a product's
ARRAYS_PER_ROW = 12  # (in,) vectors of float64 that cg and the certificate keep per row


@dataclass(frozen=True)
class LeastSquares:
    """Refit on a :class:`FixedMask`, to a certified excess per row.

    Parameters
    ----------
    tolerance
        Bound on the excess of every row, relative to its damped optimum.
    method
        ``"direct"``, ``"cg"``, or ``"auto"``: the cheaper one, and direct for rows on
        which cg missed the tolerance.
    max_iterations
        Of cg, per correction.
    memory_budget
        Bytes for the row systems; rows are solved in chunks that fit.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"gram", "mask"})
    guarantee: ClassVar[str] = "certified excess"
    name: str = "least-squares"
    tolerance: float = 1e-8
    method: Literal["auto", "direct", "cg"] = "auto"
    max_iterations: int = 300
    memory_budget: int = 1 << 30

    def can_solve(self, problem: LayerProblem) -> bool:
        """Only a fixed mask leaves a least squares problem."""
        return isinstance(problem.pattern, FixedMask)

    def solve(
        self,
        problem: LayerProblem,
        *,
        initial: Solution | None = None,
        on_iteration: OnIteration | None = None,
    ) -> Solution:
        """Refit all rows, from `initial` if it is given, else from the dense weight."""
        mask = problem.pattern.mask(problem.weight)
        start = problem.weight if initial is None else initial.weight
        return self._solve(problem, start, mask)

    def refit(self, problem: LayerProblem, weight: Tensor, mask: Tensor) -> Solution:
        """Refit weights on the mask that a method found for a problem.

        Optimal weights are optimal for the problem as posed only if it fixes the mask.
        """
        found = self._solve(problem.with_pattern(FixedMask(mask)), weight, mask)
        if found.status is Status.OPTIMAL and not self.can_solve(problem):
            found = replace(found, status=Status.FEASIBLE)
        return found

    def _solve(self, problem: LayerProblem, start: Tensor, mask: Tensor) -> Solution:
        damping = problem.factor(torch.float64).damping
        problem = problem.with_damping(damping)
        weight = torch.where(mask, start.double(), 0)
        pending = torch.arange(len(weight), device=weight.device)
        for method in self._methods(problem, mask):
            pending = self._refit(problem, weight, mask, pending, method)
            if len(pending) == 0:
                break
        weight = weight.to(problem.dtype)
        certificate = refit_certificate(problem, weight, mask)
        met = certificate.bound <= self.tolerance
        return evaluate(
            problem,
            weight,
            mask,
            Status.OPTIMAL if met else Status.MAX_ITERATIONS,
            certificate=certificate,
            stats={"damping": damping},
        )

    def _methods(self, problem: LayerProblem, mask: Tensor) -> tuple[str, ...]:
        if self.method != "auto":
            return (self.method,)
        kept, width = int(mask.sum(dim=1).amax()), problem.shape[1]
        direct = BATCH_EFFICIENCY * kept**3 / 3
        cg = EXPECTED_ITERATIONS * 2 * width**2
        return ("direct",) if direct <= cg else ("cg", "direct")

    def _refit(
        self,
        problem: LayerProblem,
        weight: Tensor,  # (out, in) float64, updated in place
        mask: Tensor,
        pending: Tensor,  # (rows,) indices
        method: str,
    ) -> Tensor:  # indices of rows that still miss the tolerance
        """Correct the pending rows chunk by chunk."""
        missed = []
        precision = problem.factor().lower.dtype  # float64 where float32 is not enough
        gram = problem.damped_gram(precision)
        for rows in torch.split(pending, self._chunk(gram, mask[pending], method)):
            part = problem.rows(rows)
            current, kept = weight[rows], mask[rows]
            correct: Correction | None = None
            for _ in range(REFINEMENTS):
                open_rows = refit_excess(part, current, kept) > self.tolerance / 2
                if not bool(open_rows.any()):
                    break
                if correct is None:
                    correct = (
                        solve_on_supports(gram, kept)
                        if method == "direct"
                        else _conjugate_gradients(gram, kept, self.max_iterations)
                    )
                stationarity = torch.where(kept, residual(part, current), 0)
                current = current + correct(stationarity)
            weight[rows] = current
            still_open = refit_excess(part, current, kept) > self.tolerance
            missed.append(rows[still_open])
        return torch.cat(missed)

    def _chunk(self, gram: Tensor, mask: Tensor, method: str) -> int:
        """Rows that fit the memory budget."""
        per_row = 8 * ARRAYS_PER_ROW * len(gram)
        if method == "direct":
            kept = int(mask.sum(dim=1).amax())
            per_row += 3 * kept**2 * gram.dtype.itemsize
        chunk = self.memory_budget // per_row
        if chunk < 1:
            message = (
                f"one row of this refit needs {per_row} bytes, the memory budget is "
                f"{self.memory_budget}; raise it or use LeastSquares(method='cg')"
            )
            raise MemoryBudgetError(message)
        return int(chunk)


def solve_on_supports(
    gram: Tensor,  # (in, in)
    mask: Tensor,  # (rows, in)
) -> Correction:
    """Solver of ``d_S G_SS = r_S`` for all rows, each with its own support S.

    Batched Cholesky of the gathered systems; shorter rows are padded with identity.
    """
    width = len(gram)
    counts = mask.sum(dim=1)
    size = int(counts.amax())
    order = torch.argsort(~mask, dim=1, stable=True)[:, :size]  # kept indices first
    padding = torch.arange(size, device=mask.device) >= counts[:, None]
    index = order.masked_fill(padding, width)
    bordered = torch.nn.functional.pad(gram, (0, 1, 0, 1))
    systems = bordered[index[:, :, None], index[:, None, :]]
    systems.diagonal(dim1=1, dim2=2).add_(padding.to(gram.dtype))
    lower, info = torch.linalg.cholesky_ex(systems)
    if bool((info > 0).any()):
        lower, info = torch.linalg.cholesky_ex(systems.double())
        lower[info > 0] = torch.nan  # a failed factor must show in the weights
    del systems

    def correct(residuals: Tensor) -> Tensor:
        sides = torch.nn.functional.pad(residuals, (0, 1)).gather(1, index)
        solved = torch.cholesky_solve(sides[:, :, None].to(lower.dtype), lower)[:, :, 0]
        change = residuals.new_zeros(len(residuals), width + 1)
        change.scatter_(1, index, solved.to(residuals.dtype))
        inside: Tensor = change[:, :width]
        return inside

    return correct


def _conjugate_gradients(gram: Tensor, mask: Tensor, max_iterations: int) -> Correction:
    """Jacobi-preconditioned conjugate gradients on every row, finished rows dropped."""
    target = 1e-5 if gram.dtype == torch.float32 else 1e-8

    def correct(residuals: Tensor) -> Tensor:
        scale = residuals.norm(dim=1, keepdim=True)
        unit = residuals / torch.where(scale > 0, scale, 1)  # float32 keeps small rows
        change, _ = masked_cg(gram, mask, unit.to(gram.dtype), target, max_iterations)
        rescaled: Tensor = change.to(residuals.dtype) * scale
        return rescaled

    return correct


def masked_cg(
    gram: Tensor,  # (in, in)
    mask: Tensor,  # (rows, in)
    sides: Tensor,  # (rows, in), zero off the mask
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, int]:  # (rows, in)
    """Solve ``d_S G_SS = b_S`` for all rows by preconditioned conjugate gradients.

    Parameters
    ----------
    gram
        Damped gram, positive definite.
    mask
        Support S of each row, True = kept.
    sides
        Right-hand sides b.
    tolerance
        On the residual norm of each row, relative to its right-hand side.
    max_iterations
        Products with the gram, each 2 rows in^2 operations.

    Returns
    -------
    tuple
        Solutions, zero off the mask, and the number of iterations.
    """
    solution = torch.zeros_like(sides)
    inverse_diagonal = 1 / gram.diagonal()
    goal = tolerance * sides.norm(dim=1)
    rows = (sides.norm(dim=1) > goal).nonzero()[:, 0]
    kept, rest, found = mask[rows], sides[rows], solution[rows]
    direction = rest * inverse_diagonal
    energy = (rest * direction).sum(dim=1, keepdim=True)
    iterations = 0
    while len(rows) and iterations < max_iterations:
        iterations += 1
        image = (direction @ gram).masked_fill_(~kept, 0)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        step = torch.where(curvature > 0, energy / curvature, 0)
        found = found + step * direction
        rest = rest - step * image
        scaled = rest * inverse_diagonal
        previous, energy = energy, (rest * scaled).sum(dim=1, keepdim=True)
        ratio = torch.where(previous > 0, energy / previous, 0)
        direction = scaled + ratio * direction
        done = rest.norm(dim=1) <= goal[rows]
        if bool(done.any()):
            solution[rows[done]] = found[done]
            more = ~done
            rows, kept, rest, found = rows[more], kept[more], rest[more], found[more]
            direction, energy = direction[more], energy[more]
    solution[rows] = found
    return solution, iterations

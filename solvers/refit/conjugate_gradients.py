r"""Conjugate gradients on ``d_S G_SS = r_S`` for all rows at once, each with its support.

G is a damped gram and S the support of a row, or G is the inverse of a damped gram and S
the complement (:mod:`.rounds`). For the exact refit of wide layers, four things are added
to the plain method (:mod:`.polish`):

- the gram is scaled to unit diagonal, and a model of it (:mod:`.factor_model`) is the
  preconditioner, exactly inverted on every support;
- products with the gram may run in bfloat16. Only the remainder ``C - U V U^T`` is
  rounded; the leading directions and the diagonal stay in the working precision, so the
  error is relative to the small part. The residual is recomputed in the working precision
  every few iterations, and before the first row counts as done;
- the direction is made conjugate by the change of the residual, which allows for inexact
  products [1]_;
- a row is done when its possible gain is below a given share of its objective. Rows that
  are done are removed from the batch at the next check. On a GPU a check takes place only
  every few iterations, because it synchronises.

References
----------
.. [1] G. Golub, Q. Ye, "Inexact Preconditioned Conjugate Gradient Method with Inner-Outer
   Iteration", SIAM J. Scientific Computing 1999.
.. [2] H. van der Vorst, Q. Ye, "Residual Replacement Strategies for Krylov Subspace
   Iterative Methods", SIAM J. Scientific Computing 2000.
"""

from collections.abc import Mapping
from copy import copy
from typing import Literal

import torch
from torch import Tensor

from layerwise.gram import exact_bfloat16
from layerwise.solvers.refit.factor_model import FactorModel

Products = Literal["auto", "bfloat16", "float32"]

CHECK_EVERY = {"cuda": 4}  # iterations between two checks which rows are done, else 1
REPLACE_EVERY = 12  # iterations between two exact residuals, with rounded products
BFLOAT16_UNITS = ("amx_bf16", "avx512_bf16")  # of processors
NARROW = 512  # width below which other work outweighs the products
FEWEST_DONE = 0.1  # smallest share of finished rows that is worth a smaller batch


class SupportSolver:
    """A gram prepared for systems on many supports.

    Parameters
    ----------
    gram
        Damped gram or its inverse, shape (in, in), in the working precision.
    rank
        Rank of the model that preconditions; 0 for the diagonal alone.
    products
        Precision of the products with the gram: ``"bfloat16"``, ``"float32"`` for the
        working precision, or ``"auto"``, bfloat16 if the device has units for it.
    """

    def __init__(self, gram: Tensor, rank: int, products: Products = "auto") -> None:
        self.root = gram.diagonal().sqrt()
        self.gram = gram / self.root / self.root[:, None]
        self.model = FactorModel.of(self.gram, rank)
        self._remainder: Tensor | None = None
        rounds = products == "bfloat16" or (products == "auto" and rounding_pays(gram))
        if rounds and gram.dtype == torch.float32:
            basis, values = self.model.basis, self.model.values
            rest = torch.addmm(self.gram, basis * values, basis.T, alpha=-1)
            self._diagonal = rest.diagonal().clone()
            self._remainder = rest.fill_diagonal_(0).to(torch.bfloat16)

    @property
    def can_round(self) -> bool:
        """Whether products in bfloat16 are prepared."""
        return self._remainder is not None

    def image(self, rows: Tensor) -> Tensor:
        """Rows (m, in) times the unscaled gram."""
        scaled = (rows * self.root).to(self.gram.dtype)
        return (scaled @ self.gram) * self.root

    def product(self, rows: Tensor, out: Tensor, rounded: bool) -> Tensor:
        """Rows (m, in) times the gram of unit diagonal, its remainder rounded or not."""
        if not rounded:
            return torch.mm(rows, self.gram, out=out)
        assert self._remainder is not None
        half = rows.to(torch.bfloat16)
        if exact_bfloat16(rows.device):
            out = torch.mm(half, self._remainder, out_dtype=torch.float32)
        else:
            out.copy_(half @ self._remainder)
        out.addcmul_(rows, self._diagonal)
        if self.model.rank == 0:
            return out
        basis = self.model.basis
        return out.addmm_((rows @ basis).mul_(self.model.values), basis.T)

    def solve(
        self,
        mask: Tensor,  # (rows, in)
        residuals: Tensor,  # (rows, in), zero off the mask
        objective: Tensor,  # (rows,)
        floor: Tensor,  # (rows,)
        excess: Tensor,  # (rows,)
        tolerance: float,
        max_iterations: int,
        *,
        rounded: bool,
        rises: bool = False,
    ) -> tuple[Tensor, int]:  # (rows, in)
        """Change of every row that solves ``d_S G_SS = r_S`` well enough.

        Parameters
        ----------
        mask
            Support S of each row, True = in S.
        residuals
            ``r_S``, minus half the gradient of the objective.
        objective
            Objective of each row at the start; it falls by ``<d, r>``.
        floor
            Smaller objectives count as this value.
        excess
            Bound on the possible decrease of the objective at the start. It is assumed to
            fall in proportion to ``r M^-1 r``, with M the model of the gram.
        tolerance
            A row is done when its excess is below this share of its objective.
        max_iterations
            Largest number of products with the gram.
        rounded
            Whether the products are rounded to bfloat16.
        rises
            Whether the objective is maximised: it rises by ``<d, r>``.

        Returns
        -------
        tuple
            Changes, zero off the mask, and the number of iterations.
        """
        dtype = self.gram.dtype
        norms = residuals.norm(dim=1)
        scale = torch.where(norms > 0, norms, 1)  # float32 keeps small rows
        rhs = (residuals / self.root / scale[:, None]).to(dtype)
        value, least, bound = (
            (v / scale.square()).to(dtype) for v in (objective, floor, excess)
        )
        batch = _Batch(self, mask.to(dtype), rhs, value, 1 if rises else -1)
        share = tolerance * torch.where(bound > 0, batch.energy / bound, 1)
        rounding = torch.finfo(dtype).eps ** 2 * batch.energy  # smaller values are rounding
        solution = torch.zeros_like(rhs)
        rows = torch.arange(len(rhs), device=rhs.device)
        iteration, check_every = 0, CHECK_EVERY.get(rhs.device.type, 1)
        recomputed = not rounded  # whether the residual was computed exactly by now
        while True:
            doubtful = False
            if iteration % check_every == 0 or iteration == max_iterations:
                enough = share * torch.maximum(batch.value, least)
                done = ~(batch.energy > torch.maximum(enough, rounding))
                if iteration == max_iterations:
                    done = torch.ones_like(done)
                doubtful = not recomputed and 0 < iteration < max_iterations
                if float(done.float().mean()) < FEWEST_DONE:
                    doubtful = False
                elif not doubtful:
                    solution[rows[done]] = batch.solution[done]
                    more = (~done).nonzero()[:, 0]  # each use of a mask would synchronise
                    batch = batch.rows(more)
                    rows, share = rows[more], share[more]
                    least, rounding = least[more], rounding[more]
                if len(rows) == 0:
                    break
            iteration += 1
            exact = doubtful or iteration % REPLACE_EVERY == 0
            batch.advance(rounded, exact=exact)
            recomputed = recomputed or exact
        return solution.to(residuals.dtype) * scale[:, None] / self.root, iteration


class _Batch:
    """Rows that still iterate, with the workspace of an iteration."""

    def __init__(
        self,
        system: SupportSolver,
        kept: Tensor,  # (rows, in)
        rhs: Tensor,  # (rows, in)
        value: Tensor,  # (rows,)
        sign: int,
    ) -> None:
        self._system, self._sign = system, sign
        self._inverse = system.model.restricted(kept)
        self._rhs, self._rest = rhs, rhs.clone()
        self.value = value
        self.solution = torch.zeros_like(rhs)
        self._allocate()
        self._inverse.solve(self._rest, self._ahead)
        self._direction = self._ahead.clone()
        self.energy = self._dot(self._rest, self._ahead)

    def _allocate(self) -> None:
        self._ahead = torch.empty_like(self._rest)
        self._image = torch.empty_like(self._rest)
        self._products = torch.empty_like(self._rest)

    def _dot(self, left: Tensor, right: Tensor) -> Tensor:  # (rows,)
        return torch.mul(left, right, out=self._products).sum(dim=1)

    def rows(self, selection: Tensor) -> "_Batch":
        """Return the batch of some rows."""
        other = copy(self)
        other._inverse = self._inverse.rows(selection)
        for name in ("_rhs", "_rest", "_direction", "solution", "value", "energy"):
            setattr(other, name, getattr(self, name)[selection])
        other._allocate()
        return other

    def advance(self, rounded: bool, *, exact: bool) -> None:
        """Make one step; `exact` computes the new residual without rounded products."""
        system, kept = self._system, self._inverse.kept
        self._image = system.product(self._direction, self._image, rounded).mul_(kept)
        curvature = self._dot(self._direction, self._image)
        step = torch.where(curvature > 0, self.energy / curvature, 0)[:, None]
        self.solution.addcmul_(step, self._direction)
        self.value = self.value + self._sign * step[:, 0] * self.energy
        if rounded and exact:
            torch.addmm(self._rhs, self.solution, system.gram, alpha=-1, out=self._rest)
            self._rest.mul_(kept)
        else:
            self._rest.addcmul_(step, self._image, value=-1)
        self._inverse.solve(self._rest, self._ahead)
        before, self.energy = self.energy, self._dot(self._rest, self._ahead)
        turned = -step[:, 0] * self._dot(self._image, self._ahead)
        ratio = torch.where(before > 0, turned / before, 0).clamp_(min=0)
        self._direction.mul_(ratio[:, None]).add_(self._ahead)


def rounding_pays(gram: Tensor) -> bool:
    """Whether products in bfloat16 are faster: wide grams, and units for it."""
    if len(gram) < NARROW:
        return False
    if gram.device.type == "cuda":
        return torch.cuda.get_device_capability(gram.device) >= (8, 0)
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in torch 2.10
    if gram.device.type != "cpu" or capabilities is None:
        return False
    units: Mapping[str, object] = capabilities()
    return any(units.get(name) for name in BFLOAT16_UNITS)

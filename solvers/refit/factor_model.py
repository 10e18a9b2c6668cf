r"""A gram as a diagonal plus a low rank, inverted exactly on the support of every row.

With ``D = diag(G)``, the gram of unit diagonal is modelled by its leading eigenpairs and
one level for all other eigenvalues,

.. math:: D^{-1/2} G D^{-1/2} \approx U (\Lambda - \delta I) U^T + \delta I .

The model is shared by all rows. On a support S it is inverted by the Woodbury identity
with one (rank, rank) matrix per row:

.. math:: M_{SS}^{-1} = \tfrac 1 \delta \Big(I - \tfrac 1 \delta U_S K_S^{-1} U_S^T\Big),
          \quad K_S = (\Lambda - \delta I)^{-1} + \tfrac 1 \delta U_S^T U_S .

Conjugate gradients are slowed down by large eigenvalues. These belong to a few directions
that all inputs share, so one model fits all rows although their supports differ.

References
----------
.. [1] N. Halko, P. Martinsson, J. Tropp, "Finding Structure with Randomness", SIAM Review
   2011, algorithm 4.4 (randomised subspace iteration).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = 16
SUBSPACE_ITERATIONS = 3
LEADING = 1.5  # eigenvalues above this multiple of the mean of the others are modelled
BLOCK = 32  # columns of the (rank, rank) matrices that are built in one product


@dataclass(frozen=True, eq=False)
class FactorModel:
    """``U diag(values) U^T + level I``, close to a gram with unit diagonal.

    Parameters
    ----------
    basis
        Orthonormal directions U, shape (in, rank).
    values
        Their eigenvalues minus the level, shape (rank,), positive.
    level
        The eigenvalue that represents all others.
    """

    basis: Tensor
    values: Tensor
    level: float

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.values)

    @classmethod
    def of(cls, gram: Tensor, rank: int) -> "FactorModel":
        """Model of at most the given rank, for a gram with unit diagonal.

        Cost: ``SUBSPACE_ITERATIONS + 2`` products of (in, in) and (in, rank).
        """
        width = len(gram)
        if rank == 0:
            return cls(gram.new_empty(width, 0), gram.new_empty(0), 1.0)
        columns = min(width, rank + OVERSAMPLING)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(width, columns, generator=generator, dtype=gram.dtype)
        basis = torch.linalg.qr(gram @ start.to(gram.device))[0]
        for _ in range(SUBSPACE_ITERATIONS):
            basis = torch.linalg.qr(gram @ basis)[0]
        values, vectors = torch.linalg.eigh(basis.T @ (gram @ basis))
        values, vectors = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
        count, level, modelled = 0, 1.0, 0.0
        noise = torch.finfo(gram.dtype).eps * width  # of the trace
        for value in values.tolist():
            modelled += value
            rest = max(width - modelled, 0.0) / max(width - count - 1, 1)  # of the trace
            none_left = count + 1 == width or width - modelled <= noise
            if value <= LEADING * rest or none_left:  # a level for none is rounding
                break
            count, level = count + 1, rest
        return cls(basis @ vectors[:, :count], values[:count] - level, level)

    def restricted(self, kept: Tensor) -> "RestrictedModel":
        """Inverse on the support of every row of `kept`, (rows, in), 1 = kept.

        Cost: O(rows in rank^2), and rank^3 per row.
        """
        rows, rank = len(kept), self.rank
        if rank == 0:
            return RestrictedModel(self, kept, self.basis.new_empty(rows, 0, 0))
        matrix = self.basis.new_empty(rows, rank, rank)
        for begin in range(0, rank, BLOCK):  # lower triangle, all rows in one product
            end = min(begin + BLOCK, rank)
            pairs = self.basis[:, begin:end, None] * self.basis[:, None, :end]
            product = kept @ pairs.flatten(1)
            matrix[:, begin:end, :end] = product.view(rows, end - begin, end)
        matrix /= self.level
        matrix.diagonal(dim1=1, dim2=2).add_(1 / self.values)
        lower, info = torch.linalg.cholesky_ex(matrix)
        broken = (info > 0)[:, None, None]  # these rows do not use the model
        lower = torch.where(broken, torch.eye(rank).to(lower), lower)
        inverses = torch.cholesky_inverse(lower).masked_fill_(broken, 0)
        return RestrictedModel(self, kept, inverses)


@dataclass(frozen=True, eq=False)
class RestrictedModel:
    """Preconditioner: the inverse of a model on the support of every row.

    Parameters
    ----------
    model
        The model, shared by all rows.
    kept
        Supports, shape (rows, in), ones and zeros.
    inverses
        ``K_S^-1`` of every row, shape (rows, rank, rank).
    """

    model: FactorModel
    kept: Tensor
    inverses: Tensor

    def solve(self, residuals: Tensor, out: Tensor) -> Tensor:
        """``level * M_SS^-1 r_S`` of every row r of (rows, in), zero off the supports."""
        if self.model.rank == 0:
            return out.copy_(residuals)
        basis, level = self.model.basis, self.model.level
        inner = torch.bmm((residuals @ basis)[:, None], self.inverses)[:, 0]
        return torch.addmm(residuals, inner, basis.T, alpha=-1 / level, out=out).mul_(
            self.kept
        )

    def rows(self, selection: Tensor) -> "RestrictedModel":
        """Return the preconditioner of some rows."""
        return RestrictedModel(self.model, self.kept[selection], self.inverses[selection])

"""A symmetric matrix whose low-rank updates wait until there are enough of them.

An update of rank one or two reads and writes the whole matrix for a few operations per
entry. Updates that wait are applied together, as one product of matrices, which runs at
the speed of the processor and not of its memory. Rows that are needed before are computed
from the waiting updates.

References
----------
.. [1] J. J. Dongarra, J. Du Croz, S. Hammarling, I. Duff, "A Set of Level 3 Basic Linear
   Algebra Subprograms", ACM Transactions on Mathematical Software 16 (1990), section 2
   (updates in blocks).
"""

import torch
from torch import Tensor

WAITING = 128  # largest rank of the updates that wait


class DelayedMatrix:
    """Symmetric matrix ``M - L^T R``, of which the product waits.

    Parameters
    ----------
    matrix
        Shape (n, n); it is copied.
    groups
        Rows and columns of each diagonal block that is kept up to date, shape
        (blocks, size); n stands for no entry.
    """

    def __init__(self, matrix: Tensor, groups: Tensor) -> None:
        self._matrix, self._groups = matrix.clone(), groups
        self._left = matrix.new_zeros(WAITING, len(matrix))
        self._right = self._left.clone()
        self._rank = 0
        self.diagonal = blocks_of(self._matrix, groups, groups)

    def __len__(self) -> int:
        return len(self._matrix)

    def reset(self, matrix: Tensor) -> None:
        """Take the entries of another matrix, shape (n, n)."""
        self._matrix.copy_(matrix)
        self._rank = 0
        self.diagonal = blocks_of(matrix, self._groups, self._groups)

    def settled(self) -> Tensor:
        """Apply all updates; return the matrix itself, shape (n, n)."""
        if self._rank:
            left, right = self._left[: self._rank], self._right[: self._rank]
            self._matrix.addmm_(left.T, right, alpha=-1)
            self._rank = 0
        return self._matrix

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows of the current matrix, shape (indices, n)."""
        left, right = self._left[: self._rank], self._right[: self._rank]
        return torch.addmm(self._matrix[indices], left[:, indices].T, right, alpha=-1)

    def subtract(self, left: Tensor, right: Tensor) -> None:
        """Subtract ``left^T right``, which must be symmetric; both have shape (rank, n)."""
        rank = len(left)
        if rank > WAITING:
            self.settled().addmm_(left.T, right, alpha=-1)
            self.diagonal = blocks_of(self._matrix, self._groups, self._groups)
            return
        if self._rank + rank > WAITING:
            self.settled()
        end = self._rank + rank
        self._left[self._rank : end], self._right[self._rank : end] = left, right
        self._rank = end
        inside = self._groups.clamp(max=len(self) - 1)
        first, second = left[:, inside].permute(1, 2, 0), right[:, inside].permute(1, 0, 2)
        outside = self._groups == len(self)
        outside = outside[:, :, None] | outside[:, None]
        self.diagonal -= (first @ second).masked_fill_(outside, 0)

    def replace(self, groups: Tensor, indices: Tensor, rows: Tensor) -> None:
        """Replace the rows of some groups, and the columns of the same indices.

        Parameters
        ----------
        groups, indices
            The groups, and all their rows, shape (indices,).
        rows
            Shape (indices, n); their part at the indices is symmetric.
        """
        self._left[: self._rank, indices] = 0
        self._right[: self._rank, indices] = 0
        self._matrix[indices], self._matrix[:, indices] = rows, rows.T
        changed = self._groups[groups]
        self.diagonal[groups] = blocks_of(self._matrix, changed, changed)


def blocks_of(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Blocks (..., size, size) of a matrix; zero where an index is one past its end."""
    last = len(matrix) - 1
    blocks = matrix[
        rows.clamp(max=last)[..., :, None], columns.clamp(max=last)[..., None, :]
    ]
    outside = (rows > last)[..., :, None] | (columns > last)[..., None, :]
    return blocks.masked_fill_(outside, 0)

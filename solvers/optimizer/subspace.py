"""Low-rank factors of a matrix, or of a stack of matrices, by subspace iteration.

Problem: given A (m, n) and a rank k, find an orthonormal Q (m, k) for which the projection
``Q Q^T A`` is close to A. With ``U = A^T Q`` (n, k), the projection is the product
``Q U^T``. Its error follows without a residual: ``||A - Q U^T||^2 = ||A||^2 - ||U||^2`` in
the Frobenius norm.

One iteration is ``Q = qr(A U)``, ``U = A^T Q``: 4 m n k operations for the products and
about 4 m k^2 for the orthonormal basis. Errors shrink like a power of the ratio of the
singular values after and before the cut. So a start that is nearly right needs one
iteration, and a random start several. Leading dimensions are batches everywhere.

References
----------
.. [1] N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding Structure with Randomness:
   Probabilistic Algorithms for Constructing Approximate Matrix Decompositions",
   SIAM Review 53(2), 2011, section 4.5, https://doi.org/10.1137/090771806
.. [2] P. Zhao, P. Li, Y. Gu, Y. Zheng, S. L. Kölker, Z. Wang, X. Yuan, "Adapprox: Adaptive
   Approximation in Adam Optimization via Randomized Low-Rank Matrices", 2024,
   arXiv:2403.14958, algorithm 1.
"""

import torch
from torch import Generator, Tensor

from layerwise.errors import UsageError


def subspace_iteration(
    A: Tensor,  # (..., m, n)
    rank: int,
    *,
    oversampling: int = 5,
    iterations: int = 5,
    start: Tensor | None = None,  # (..., n, any)
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:  # (..., m, rank), (..., n, rank)
    """Orthonormal Q and ``U = A^T Q`` with ``Q U^T`` close to A.

    The first `rank` of ``rank + oversampling`` columns are returned, in the order of the QR
    decomposition. This is the order of the singular values only after convergence;
    :func:`by_singular_value` sorts them.

    Parameters
    ----------
    A
        Matrix or stack, float32 or float64: a basis is not orthonormal in less.
    rank
        Columns of the factors, at most ``min(m, n)``.
    oversampling
        Columns that are iterated in addition and then dropped.
    iterations
        Number of iterations, at least one.
    start
        Columns to start from, such as U of a similar matrix. Missing columns are drawn
        from the normal distribution.
    generator
        Generator of these columns, on the CPU, so that every device gets the same numbers.
    """
    rows, columns = A.shape[-2:]
    if not 1 <= rank <= min(rows, columns):
        message = f"rank must be between 1 and {min(rows, columns)}, got {rank}"
        raise UsageError(message)
    if oversampling < 0 or iterations < 1:
        message = (
            "oversampling must not be negative and iterations must be positive, got "
            f"{oversampling} and {iterations}"
        )
        raise UsageError(message)
    width = min(rank + oversampling, rows, columns)
    U = A.new_empty(*A.shape[:-2], columns, 0) if start is None else start[..., :width]
    if U.shape[-1] < width:
        missing = (*A.shape[:-2], columns, width - U.shape[-1])
        drawn = torch.randn(missing, generator=generator, dtype=torch.float32)
        U = torch.cat([scaled(U), drawn.to(A)], dim=-1)
    Q = torch.linalg.qr(A @ scaled(U)).Q
    for _ in range(iterations - 1):
        Q = torch.linalg.qr(A @ scaled(A.mT @ Q)).Q
    U = A.mT @ Q
    return Q[..., :rank], U[..., :rank]


def scaled(U: Tensor) -> Tensor:
    """Columns divided by their largest entries: products of small squares underflow."""
    if U.shape[-1] == 0:
        return U
    largest = U.abs().amax(dim=-2, keepdim=True)
    return U / largest.clamp_min(torch.finfo(U.dtype).tiny)


def by_singular_value(Q: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of the same product, with orthogonal columns of U, the longest first.

    Their lengths are the singular values of the product, so that a truncation is its best
    approximation of any smaller rank. The rotation consists of the eigenvectors of
    ``U^T U``, k x k, in float64.
    """
    small = U.double() / _norm(U)[..., None, None].clamp_min(torch.finfo(U.dtype).tiny)
    rotation = torch.linalg.eigh(small.mT @ small).eigenvectors.flip(-1).to(U.dtype)
    return Q @ rotation, U @ rotation


def error_rates(A: Tensor, U: Tensor) -> Tensor:  # (..., k) float64
    """Relative error ``||A - Q U^T|| / ||A||`` of every truncation, 1 to k columns.

    U must be ``A^T Q`` with an orthonormal Q. The error of a zero matrix is zero.
    """
    total = _norm(A)[..., None]
    lengths = torch.linalg.vector_norm(U, dim=-2, dtype=torch.float64)
    kept = (lengths / total.clamp_min(torch.finfo(torch.float64).tiny)).square()
    rates = (1 - kept.cumsum(dim=-1)).clamp_min(0).sqrt()
    return torch.where(total > 0, rates, torch.zeros_like(rates))


def error_rate(A: Tensor, U: Tensor) -> Tensor:  # (...) float64
    """Relative error of ``Q U^T`` with all columns, as in :func:`error_rates`."""
    return error_rates(A, U)[..., -1]


def _norm(A: Tensor) -> Tensor:
    """Frobenius norm in float64, because squares of small numbers vanish in float32."""
    norm: Tensor = torch.linalg.vector_norm(A, dim=(-2, -1), dtype=torch.float64)
    return norm

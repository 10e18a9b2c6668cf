"""Second moments of the inputs of a layer: all that a layer problem keeps of the data.

The objective ``||W X - What Xhat||_F^2 / tokens`` depends on the inputs only through

    gram        G = Xhat Xhat^T / tokens      (in, in)
    cross_gram  C = X Xhat^T / tokens         (in, in), not symmetric; C = G if Xhat = X
    drift       ||W (X - Xhat)||^2 / tokens   (out,), per matrix, zero if Xhat = X

:mod:`layerwise.accumulator` collects them.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from layerwise.errors import InvalidProblemError
from layerwise.linalg import Factor, factorize
from layerwise.validation import check_gram, check_matrix

Shared = TypeVar("Shared")

CONSTANT_VARIANCE = 1e-6  # of the second moment, whose float32 products round near 1e-7
VECTORS = ("input_mean", "pruned_input_mean", "fluctuation")
EXACT_RANK_WIDTH = 2048  # above it, an eigenvalue decomposition costs more than it tells


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of the inputs, shared by reference by all matrices that read them.

    Parameters
    ----------
    gram
        ``Xhat Xhat^T / tokens``, shape (in, in), symmetric positive semi-definite. What it
        lacks of symmetry by rounding is averaged: the objective reads no more of it.
    cross_gram
        ``X Xhat^T / tokens``, shape (in, in); None if the dense and the pruned model see
        the same inputs.
    input_mean, pruned_input_mean
        Means over tokens, shape (in,); None if they were not collected.
    n_tokens
        Number of tokens behind the averages; 0 if unknown.
    fluctuation
        Statistic of :mod:`layerwise.fluctuation` of the inputs Xhat, shape (in,); None if
        it was not collected.

    Notes
    -----
    Everything is kept in float64. Factorizations are cached per damping, so q, k and v
    pay for one.
    """

    may_vanish: ClassVar[bool] = False  # whether a gram of zeros says something
    gram: Tensor
    cross_gram: Tensor | None = None
    input_mean: Tensor | None = None
    pruned_input_mean: Tensor | None = None
    n_tokens: int = 0
    fluctuation: Tensor | None = None
    _scaled: dict[float, "Moments"] = field(default_factory=dict, init=False, repr=False)
    _shared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("gram", "cross_gram", *VECTORS):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, value.detach().to(torch.float64))
        if not check_gram(self.gram, self._noise(), self.may_vanish):
            # the objective reads no more of it
            object.__setattr__(self, "gram", (self.gram / 2).add_(self.gram.T, alpha=0.5))
        if self.cross_gram is not None:
            check_matrix(self.cross_gram, "cross_gram", self.width)
        for name in VECTORS:
            vector = getattr(self, name)
            if vector is not None and tuple(vector.shape) != (self.width,):
                shape = tuple(vector.shape)
                message = f"{name} has shape {shape}, expected ({self.width},)"
                raise InvalidProblemError(message)

    def _noise(self) -> Tensor | None:
        """Rounding of the diagonal, (in,), beside that of the gram itself."""
        return None

    @property
    def width(self) -> int:
        """Number of input channels."""
        return self.gram.shape[0]

    @cached_property
    def mean_diagonal(self) -> float:
        """Mean of diag(gram): the unit in which damping is measured."""
        return float(self.gram.diagonal().mean())

    @cached_property
    def dead_channels(self) -> int:
        """Number of inputs that are zero in every token."""
        return int((self.gram.diagonal() == 0).sum())

    @cached_property
    def rank(self) -> int:
        """Numerical rank of the gram; for wide layers the bound by tokens and live inputs.

        Up to width 2048 eigenvalues of the unit-diagonal gram above ``width`` times the
        float32 rounding are counted.
        """
        live = self.gram.diagonal() > 0
        bound = int(live.sum())
        if self.n_tokens:
            bound = min(bound, self.n_tokens)
        if self.width > EXACT_RANK_WIDTH or bound == 0:
            return bound
        gram = self.gram[live][:, live]
        root = gram.diagonal().sqrt()
        eigenvalues = torch.linalg.eigvalsh(gram / root / root[:, None])
        rounding = torch.finfo(torch.float32).eps * len(root)
        return min(bound, int((eigenvalues > rounding).sum()))

    def factor(
        self, damping: float, dtype: torch.dtype, *, reverse: bool = False
    ) -> Factor:
        """Cholesky factor of the damped gram, by the ladder of `linalg`; cached.

        `reverse` factors the gram with its channels in reverse order, which gives an
        upper triangular V with ``V V^T`` equal to the gram.
        """

        def make() -> Factor:
            gram = self.gram.flip(0, 1) if reverse else self.gram
            return factorize(gram, self.mean_diagonal, damping, dtype)

        return self.shared(("factor", damping, dtype, reverse), make)

    def shared(self, key: Hashable, make: Callable[[], Shared]) -> Shared:
        """What was made of these moments, made once for all matrices that read them.

        Parameters
        ----------
        key
            Names the thing with everything that decides it.
        make
            Called if it does not exist yet.
        """
        if key not in self._shared:
            self._shared[key] = make()
        found: Shared = self._shared[key]
        return found

    def scaled(self, factor: float) -> "Moments":
        """Moments of inputs multiplied by ``sqrt(factor)``; exact for powers of two.

        Cached, so that all matrices with these inputs share their factorizations.
        """
        if factor in self._scaled:
            return self._scaled[factor]

        def times(value: Tensor | None, by: float) -> Tensor | None:
            return None if value is None else value * by

        root = factor**0.5
        self._scaled[factor] = type(self)(
            self.gram * factor,
            times(self.cross_gram, factor),
            times(self.input_mean, root),
            times(self.pruned_input_mean, root),
            self.n_tokens,
            times(self.fluctuation, factor),
        )
        return self._scaled[factor]

    def centered(self) -> "CenteredMoments":
        """Moments about the means: ``G - muhat muhat^T`` and ``C - mu muhat^T``.

        A channel whose variance drowns in the rounding of its second moment is constant:
        its weights then act as a bias, and its variance counts as exactly zero.
        """
        cross, pruned_mean = self.cross_gram, self.pruned_input_mean
        if cross is None and pruned_mean is None:
            pruned_mean = self.input_mean
        if self.input_mean is None or pruned_mean is None:
            message = "centering needs input means; collect the moments with their means"
            raise InvalidProblemError(message)
        gram = self.gram - torch.outer(pruned_mean, pruned_mean)
        constant = gram.diagonal() <= CONSTANT_VARIANCE * self.gram.diagonal()
        gram[constant] = 0
        gram[:, constant] = 0
        if cross is not None:
            cross = cross - torch.outer(self.input_mean, pruned_mean)
            cross[:, constant] = 0
        return CenteredMoments(
            gram, cross, self.input_mean, pruned_mean, n_tokens=self.n_tokens
        )


@dataclass(frozen=True, eq=False)
class CenteredMoments(Moments):
    """Moments about the means; the gram is zero if every input is constant."""

    may_vanish: ClassVar[bool] = True

    def _noise(self) -> Tensor | None:
        """Variances are rests of second moments, and have their rounding."""
        mean = self.pruned_input_mean
        if mean is None:
            return None
        return CONSTANT_VARIANCE * (self.gram.diagonal() + mean.square())


def even_exponent(mean_diagonal: float) -> int:
    """Power of two near a number, even, so that its root is a power of two as well."""
    exponent = math.frexp(mean_diagonal)[1]
    return exponent - exponent % 2

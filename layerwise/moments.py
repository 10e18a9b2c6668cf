"""Second moments of the inputs of a layer: the only data that a layer problem keeps.

The objective ``||W X - What Xhat||_F^2 / tokens`` depends on the inputs only through

    gram        G = Xhat Xhat^T / tokens      (in, in)
    cross_gram  C = X Xhat^T / tokens         (in, in), not symmetric; C = G if Xhat = X
    drift       ||W (X - Xhat)||^2 / tokens   (out,), per matrix, zero if Xhat = X

:mod:`layerwise.accumulator` collects them.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from layerwise.arrays import real_tensor
from layerwise.errors import InvalidProblemError
from layerwise.linalg import Factor, factorize
from layerwise.validation import (
    SLACK,
    check_definite,
    check_diagonal,
    check_gram,
    check_matrix,
    check_mean,
    check_not_negative,
    check_vector,
)

Shared = TypeVar("Shared")

# rounding of sums of squares, relative: of float64 sums over thousands of chunks, and of
# moments that were stored in a shorter type, in units of its epsilon
SUM_ROUNDING, STORED_EPSILONS = 1e-12, 8
NOISE = 1e-6  # of second moments from products in float32, for the check of covariances
NEGATIVE = 1e-6  # of the trace: how far rounding can make an eigenvalue negative
VECTORS = ("input_mean", "pruned_input_mean", "fluctuation")
EXACT_RANK_WIDTH = 2048  # above it, an eigenvalue decomposition takes too long


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of the inputs, shared by reference by all matrices that read them.

    Parameters
    ----------
    gram
        ``Xhat Xhat^T / tokens``, shape (in, in), symmetric positive semi-definite. If it is
        not exactly symmetric, its symmetric part is taken, which gives the same objective.
    cross_gram
        ``X Xhat^T / tokens``, shape (in, in); None if the dense and the pruned model see
        the same inputs.
    input_mean, pruned_input_mean
        Means over tokens, shape (in,); None if they were not collected.
    n_tokens
        Number of tokens that were averaged; 0 if unknown.
    fluctuation
        Statistic of :mod:`layerwise.fluctuation` of the inputs Xhat, shape (in,); None if
        it was not collected.
    rounding
        Relative rounding of the second moments. It is at least that of the type in which
        `gram` is given; a smaller variance is not in the data.
    summed
        Whether the moments were summed up from inputs, so that nothing has to show that
        they are the moments of some.

    Notes
    -----
    Everything is kept in float64. Factorizations are cached per damping, so q, k and v
    pay for one.
    """

    may_vanish: ClassVar[bool] = False  # whether a gram of zeros is valid
    gram: Tensor
    cross_gram: Tensor | None = None
    input_mean: Tensor | None = None
    pruned_input_mean: Tensor | None = None
    n_tokens: int = 0
    fluctuation: Tensor | None = None
    rounding: float = SUM_ROUNDING
    summed: bool = False
    _scaled: dict[float, "Moments"] = field(default_factory=dict, init=False, repr=False)
    _shared: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("gram", "cross_gram", *VECTORS):
            value = getattr(self, name)
            if value is None and name != "gram":
                continue
            value = real_tensor(value, name)
            if value.dtype != torch.float64:
                stored = STORED_EPSILONS * torch.finfo(value.dtype).eps
                object.__setattr__(self, "rounding", max(self.rounding, stored))
            object.__setattr__(self, name, value.to(torch.float64))
        if self.gram.dim() != 2:
            message = f"gram must be a square matrix, got shape {tuple(self.gram.shape)}"
            raise InvalidProblemError(message)
        check_matrix(self.gram, "gram", self.gram.shape[1])
        check_diagonal(self.gram.diagonal(), self.may_vanish)
        slack = max(SLACK, self.rounding)
        if not check_gram(self.gram, self._noise(), slack):
            # the objective depends on the symmetric part only
            object.__setattr__(self, "gram", (self.gram / 2).add_(self.gram.T, alpha=0.5))
        if self.cross_gram is not None:
            check_matrix(self.cross_gram, "cross_gram", self.width)
        for name in VECTORS:
            if getattr(self, name) is not None:
                check_vector(getattr(self, name), name, self.width)
        if self.fluctuation is not None:
            check_not_negative(self.fluctuation, "fluctuation")
        self._check_means(slack)

    def _check_means(self, slack: float) -> None:
        same = self.cross_gram is None and self.pruned_input_mean is None
        name = "input_mean" if same else "pruned_input_mean"
        mean = getattr(self, name)
        if mean is not None:
            check_mean(mean, self.gram, name, slack)

    def _noise(self) -> Tensor | None:
        """Rounding of the diagonal, (in,), in addition to the rounding of the gram."""
        return None

    def check_definite(self) -> None:
        """Raise unless the gram is positive semi-definite up to rounding; checked once.

        Cost: one Cholesky factorization in float32, in^3 / 3; none for summed moments.
        """
        if self.summed:
            return
        noise = self._noise()
        share = max(NEGATIVE, self.rounding / STORED_EPSILONS)
        slack = share * float(self.gram.diagonal().sum())
        slack += 0.0 if noise is None else float(noise.sum())
        self.shared("definite", lambda: check_definite(self.gram, slack))

    @property
    def width(self) -> int:
        """Number of input channels."""
        return self.gram.shape[0]

    @cached_property
    def mean_diagonal(self) -> float:
        """Mean of diag(gram), the unit in which damping is measured; 1 if that is zero."""
        return float(self.gram.diagonal().mean()) or 1.0

    @property
    def vanishes(self) -> bool:
        """Whether the gram is zero: about the means, if every input is constant."""
        return self.dead_channels == self.width

    @cached_property
    def dead_channels(self) -> int:
        """Number of inputs that are zero in every token."""
        return int((self.gram.diagonal() == 0).sum())

    @cached_property
    def rank(self) -> int:
        """Numerical rank of the gram; for wide layers the bound by tokens and live inputs.

        Up to width 2048, this is the number of eigenvalues of the unit-diagonal gram above
        ``width`` times the float32 rounding.
        """
        live = self.gram.diagonal() > 0
        bound = int(live.sum())
        if self.n_tokens:
            bound = min(bound, self.n_tokens)
        if self.width > EXACT_RANK_WIDTH or bound == 0:
            return bound
        gram = self.gram[live][:, live]
        root = gram.diagonal().sqrt()
        gram = gram / root / root[:, None]
        rounding = torch.finfo(torch.float32).eps * len(root)
        if bound == len(root):  # then a factorization shows whether all are above it
            above = gram.clone()
            above.diagonal().sub_(rounding)
            if int(torch.linalg.cholesky_ex(above)[1]) == 0:
                return bound
        return min(bound, int((torch.linalg.eigvalsh(gram) > rounding).sum()))

    def factor(
        self, damping: float, dtype: torch.dtype, *, reverse: bool = False
    ) -> Factor:
        """Cholesky factor of the damped gram, by `factorize` of `linalg`; cached.

        `reverse` factors the gram with its channels in reverse order, which gives an
        upper triangular V with ``V V^T`` equal to the gram.
        """

        def make() -> Factor:
            gram = self.gram.flip(0, 1) if reverse else self.gram
            return factorize(gram, self.mean_diagonal, damping, dtype)

        return self.shared(("factor", damping, dtype, reverse), make)

    def shared(self, key: Hashable, make: Callable[[], Shared]) -> Shared:
        """Return a value derived from these moments, computed once for all matrices.

        Parameters
        ----------
        key
            Name of the value, with everything that it depends on.
        make
            Called if the value does not exist yet.
        """
        if key not in self._shared:
            self._shared[key] = make()
        value: Shared = self._shared[key]
        return value

    def scaled(self, factor: float) -> "Moments":
        """Moments of inputs multiplied by ``sqrt(factor)``; exact for powers of two.

        Cached, so that all matrices with these inputs share their factorizations.
        """
        if factor in self._scaled:
            return self._scaled[factor]

        self._scaled[factor] = replace(self, **self._times(factor))
        return self._scaled[factor]

    def _times(self, factor: float) -> dict[str, Any]:
        """Fields of the moments of inputs multiplied by ``sqrt(factor)``."""
        root = factor**0.5
        powers = {"gram": factor, "cross_gram": factor, "fluctuation": factor}
        powers |= {"input_mean": root, "pruned_input_mean": root}
        known = {name: getattr(self, name) for name in powers}
        return {n: None if v is None else v * powers[n] for n, v in known.items()}

    def centered(self) -> "CenteredMoments":
        """Moments about the means: ``G - muhat muhat^T`` and ``C - mu muhat^T``.

        A channel is constant if its variance is below the rounding of its second moment.
        Its weights then act as a bias, and its variance is set to exactly zero. What the
        moments say about it is kept in `left_out`, to measure answers.
        """
        cross, pruned_mean = self.cross_gram, self.pruned_input_mean
        if cross is None and pruned_mean is None:
            pruned_mean = self.input_mean
        if self.input_mean is None or pruned_mean is None:
            message = "centering needs the means of the inputs; give input_mean to Moments"
            raise InvalidProblemError(message)
        gram = self.gram - torch.outer(pruned_mean, pruned_mean)
        if cross is not None:
            cross = cross - torch.outer(self.input_mean, pruned_mean)
        constant = gram.diagonal() <= self.rounding * self.gram.diagonal()
        channels = constant.nonzero()[:, 0]
        left_out = LeftOut(
            channels, gram[channels], None if cross is None else cross[:, channels]
        )
        gram[constant] = 0
        gram[:, constant] = 0
        if cross is not None:
            cross[:, constant] = 0
        return CenteredMoments(
            gram,
            cross,
            self.input_mean,
            pruned_mean,
            n_tokens=self.n_tokens,
            rounding=self.rounding,
            summed=self.summed,
            left_out=left_out,
        )


@dataclass(frozen=True, eq=False)
class LeftOut:
    """Moments of the channels that count as constant, which the gram is without.

    Parameters
    ----------
    channels
        Their indices, shape (k,).
    gram
        Their rows of the gram about the means, shape (k, in).
    cross_gram
        Their columns of the cross-gram about the means, shape (in, k), or None.
    """

    channels: Tensor
    gram: Tensor
    cross_gram: Tensor | None

    def scaled(self, factor: float) -> "LeftOut":
        """Return the same for inputs multiplied by ``sqrt(factor)``."""
        cross = self.cross_gram
        cross = None if cross is None else cross * factor
        return LeftOut(self.channels, self.gram * factor, cross)

    def objective_rows(self, dense: Tensor, weight: Tensor) -> Tensor:
        """Part of the objective that the gram is without, shape (out,).

        Parameters
        ----------
        dense, weight
            Shape (out, in), float64.
        """
        if self.cross_gram is None:
            return self._forms(dense - weight)
        mixed = (dense @ self.cross_gram) * weight[:, self.channels]
        return self._forms(weight) - 2 * mixed.sum(dim=1)

    def _forms(self, rows: Tensor) -> Tensor:
        """``r P r^T`` with the part P of the gram in these rows and columns."""
        own = rows[:, self.channels]
        twice = 2 * rows @ self.gram.T - own @ self.gram[:, self.channels]
        return (own * twice).sum(dim=1)


@dataclass(frozen=True, eq=False)
class CenteredMoments(Moments):
    """Moments about the means; the gram is zero if every input is constant."""

    may_vanish: ClassVar[bool] = True
    left_out: LeftOut | None = None

    def _check_means(self, slack: float) -> None:
        """The means of a gram about the means have nothing to do with its diagonal."""

    def _noise(self) -> Tensor | None:
        """Rounding of the second moments that the variances were computed from."""
        mean = self.pruned_input_mean
        if mean is None:
            return None
        rounding = max(NOISE, self.rounding)
        return rounding * (self.gram.diagonal() + mean.square())

    def _times(self, factor: float) -> dict[str, Any]:
        left_out = self.left_out
        scaled = None if left_out is None else left_out.scaled(factor)
        return super()._times(factor) | {"left_out": scaled}


def even_exponent(mean_diagonal: float) -> int:
    """Even exponent k with ``2^k`` near a number: its root is a power of two as well."""
    exponent = math.frexp(mean_diagonal)[1]
    return exponent - exponent % 2

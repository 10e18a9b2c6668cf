"""Second moments of the inputs of a layer: all that a layer problem keeps of the data.

The objective ``||W X - What Xhat||_F^2 / tokens`` depends on the inputs only through

    gram        G = Xhat Xhat^T / tokens      (in, in)
    cross_gram  C = X Xhat^T / tokens         (in, in), not symmetric; C = G if Xhat = X
    drift       ||W (X - Xhat)||^2 / tokens   (out,), per matrix, zero if Xhat = X

Chunks of activations are scaled by a power of two, multiplied in float32 (float64 for
float64 inputs, see :mod:`layerwise.gram` for bfloat16) and summed in float64, so half
precision activations neither overflow nor lose their sums.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from layerwise.chunks import all_finite, slabs
from layerwise.errors import InvalidProblemError
from layerwise.fluctuation import RunningFluctuation
from layerwise.gram import (
    add_gram,
    add_product,
    mirror_,
    mirrored,
    precision_of,
)
from layerwise.linalg import Factor, factorize, ieee_products

Shared = TypeVar("Shared")

MAX_EXPONENT = 120  # 2 to this power is an ordinary number in float32
CONSTANT_VARIANCE = 1e-6  # of the second moment, whose float32 products round near 1e-7
SLACK = 1e-4  # of a gram that was rounded, relative to the diagonal
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
        if not _check_gram(self.gram, self._noise(), self.may_vanish):
            # the objective reads no more of it
            object.__setattr__(self, "gram", (self.gram / 2).add_(self.gram.T, alpha=0.5))
        if self.cross_gram is not None:
            _check_matrix(self.cross_gram, "cross_gram", self.width)
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


class MomentAccumulator:
    """Streaming moments of a dense and, where it differs, a pruned input stream.

    Parameters
    ----------
    width
        Number of input channels.
    weights
        The matrices that read these inputs, each (out, in), whose drift can be asked for
        when a pruned stream is given. It comes from the gram of the difference of the
        two streams, which all of them share.
    device
        Where the sums live; chunks are moved there.
    fluctuation
        Whether to collect the statistic of :mod:`layerwise.fluctuation` too.
    """

    def __init__(
        self,
        width: int,
        weights: Sequence[Tensor] = (),
        device: torch.device | str = "cpu",
        *,
        fluctuation: bool = False,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n_tokens = 0
        self._scale = 1.0
        self._weights = [weight.detach().to(device) for weight in weights]
        self._gram, self._sum = zeros(width, width), zeros(width)
        self._cross: Tensor | None = None
        self._pruned_sum = zeros(width)
        outputs = sum(len(weight) for weight in self._weights)
        # by the gram of the difference, unless the products themselves are fewer
        self._by_gram = 2 * outputs > width
        self._drift: Tensor | None = None
        self._drifts = [zeros(len(weight)) for weight in self._weights]
        self._fluctuation = RunningFluctuation(width, device) if fluctuation else None

    @ieee_products()
    def update(self, inputs: Tensor, pruned_inputs: Tensor | None = None) -> None:
        """Add tokens: inputs of shape (..., in), of the dense and of the pruned model.

        For the fluctuation the last dimension but one counts the tokens of a sequence.
        """
        dense, exponent = self._prepare(inputs, "inputs")
        self._sum += _descale(_sum(dense), exponent)
        if pruned_inputs is None:
            if self._cross is not None:
                message = "an accumulator takes pruned inputs in every update or in none"
                raise InvalidProblemError(message)
            add_gram(self._gram, dense, 2.0 ** (2 * exponent))
        else:
            pruned, pruned_exponent = self._prepare(pruned_inputs, "pruned inputs")
            if pruned.shape != dense.shape:
                message = (
                    f"dense inputs have {dense.shape[0]} tokens, pruned inputs "
                    f"{pruned.shape[0]}"
                )
                raise InvalidProblemError(message)
            self._update_pair(dense, exponent, pruned, pruned_exponent)
        if self._fluctuation is not None:
            seen = inputs if pruned_inputs is None else pruned_inputs
            self._fluctuation.update(seen.detach().to(self._gram))
        self.n_tokens += dense.shape[0]

    def _prepare(self, inputs: Tensor, name: str) -> tuple[Tensor, int]:
        """Chunk in its product precision, scaled to magnitude 1, and the exponent."""
        width = self._gram.shape[0]
        if inputs.dim() == 0 or inputs.shape[-1] != width or inputs.is_complex():
            message = (
                f"{name} are real tensors of shape (..., {width}), got {inputs.dtype} of "
                f"shape {tuple(inputs.shape)}"
            )
            raise InvalidProblemError(message)
        tokens = inputs.detach().reshape(-1, width)
        largest = tokens.abs().amax() if tokens.numel() else tokens.new_zeros(())
        if not bool(torch.isfinite(largest)):
            row, channel = (~torch.isfinite(tokens)).nonzero()[0].tolist()
            message = (
                f"{name} contain {float(tokens[row, channel])} at token "
                f"{self.n_tokens + row}, channel {channel}"
            )
            raise InvalidProblemError(message)
        device = self._gram.device
        exponent = math.frexp(float(largest))[1]
        exponent = max(-MAX_EXPONENT, min(MAX_EXPONENT, exponent))
        tokens = tokens.to(device, precision_of(tokens.dtype, device), copy=True)
        return tokens.mul_(2.0**-exponent), exponent

    def _update_pair(
        self, dense: Tensor, exponent: int, pruned: Tensor, pruned_exponent: int
    ) -> None:
        if self._cross is None:
            if self.n_tokens:
                message = "an accumulator takes pruned inputs in every update or in none"
                raise InvalidProblemError(message)
            self._cross = torch.zeros_like(self._gram)
        add_gram(self._gram, pruned, 2.0 ** (2 * pruned_exponent))
        cross_scale = 2.0 ** (exponent + pruned_exponent)
        add_product(self._cross, dense, pruned, cross_scale)
        self._pruned_sum += _descale(_sum(pruned), pruned_exponent)
        if self._weights:
            precision = torch.promote_types(dense.dtype, torch.float32)  # it rounds
            other = _descale(pruned.to(precision), pruned_exponent - exponent)
            self._add_drift(other.neg_().add_(dense), 2.0 ** (2 * exponent))

    def _add_drift(self, change: Tensor, scale: float) -> None:
        if self._by_gram:
            if self._drift is None:
                self._drift = torch.zeros_like(self._gram)
            add_gram(self._drift, change, scale)
            return
        for weight, drift in zip(self._weights, self._drifts, strict=True):
            for rows in slabs(len(weight)):
                outputs = change @ weight[rows].to(change.dtype).T
                squares = outputs.square_().sum(dim=0, dtype=torch.float64)
                drift[rows].add_(squares, alpha=scale)

    def add_over(self, add: Callable[[list[Tensor]], None]) -> None:
        """Make these the sums of several accumulators, before they are averaged.

        Each of them, in a process of its own, was given a part of the tokens in the same
        way: with pruned inputs in all of them or in none.

        Parameters
        ----------
        add
            Adds tensors in place to those of the other processes. It gets float64 sums of
            the same shapes in the same order everywhere.

        Raises
        ------
        InvalidProblemError
            The fluctuation was asked for, which is no sum.
        """
        if self._fluctuation is not None:
            message = "the fluctuation depends on the order of all sequences: leave it out"
            raise InvalidProblemError(message)
        count = self._sum.new_tensor([self.n_tokens])
        matrices = [m for m in (self._gram, self._cross, self._drift) if m is not None]
        add([*matrices, self._sum, self._pruned_sum, *self._drifts, count])
        self.n_tokens = int(count)

    def moments(self) -> Moments:
        """Averages of everything added so far."""
        n = self._count()
        cross = None if self._cross is None else self._cross / n
        return self._averages(mirrored(self._gram) / n, cross)

    def release(self) -> tuple[Moments, int]:
        """Averages times ``2^-k``, so that their mean diagonal is near one, and k.

        They are the sums themselves, scaled exactly, so that neither this nor
        :func:`layerwise.solve` makes another gram; nothing can be added any more.
        :meth:`drift` is in the same units from here on.
        """
        n = self._count()
        gram = mirror_(self._gram).div_(n)
        exponent = even_exponent(float(gram.diagonal().mean()))
        self._scale = 2.0**-exponent
        cross = self._cross
        if cross is not None:
            cross.div_(n).mul_(self._scale)
        return self._averages(gram.mul_(self._scale), cross), exponent

    def _count(self) -> int:
        if self.n_tokens == 0:
            message = "no tokens were added; the calibration data are empty"
            raise InvalidProblemError(message)
        return self.n_tokens

    def _averages(self, gram: Tensor, cross: Tensor | None) -> Moments:
        n, root = self.n_tokens, self._scale**0.5
        fluctuation = self._fluctuation
        return Moments(
            gram,
            cross,
            self._sum / n * root,
            None if cross is None else self._pruned_sum / n * root,
            n_tokens=n,
            fluctuation=None if fluctuation is None else fluctuation.value() * self._scale,
        )

    def drift(self, index: int) -> Tensor | None:
        """Row sums of ``(W (X - Xhat))^2 / tokens`` of one matrix; None if Xhat = X."""
        if self._cross is None or not self._weights:
            return None
        if self._drift is None:
            rows = self._drifts[index]
        else:
            weight = self._weights[index].double()
            rows = ((weight @ mirrored(self._drift)) * weight).sum(dim=1)
        return rows.clamp(min=0) / self.n_tokens * self._scale


def even_exponent(mean_diagonal: float) -> int:
    """Power of two near a number, even, so that its root is a power of two as well."""
    exponent = math.frexp(mean_diagonal)[1]
    return exponent - exponent % 2


def _sum(tokens: Tensor) -> Tensor:
    """Sum over tokens, float64; of bfloat16 in float32 first, else all would be copied."""
    half = tokens.dtype == torch.bfloat16
    return tokens.sum(dim=0, dtype=torch.float32 if half else torch.float64).double()


def _descale(values: Tensor, exponent: int) -> Tensor:
    return values * 2.0**exponent


def _check_matrix(matrix: Tensor, name: str, width: int) -> None:
    if tuple(matrix.shape) != (width, width):
        message = f"{name} has shape {tuple(matrix.shape)}, expected ({width}, {width})"
        raise InvalidProblemError(message)
    if not all_finite(matrix):
        row, column = (~torch.isfinite(matrix)).nonzero()[0].tolist()
        message = f"{name} contains {float(matrix[row, column])} at ({row}, {column})"
        raise InvalidProblemError(message)


def _check_gram(gram: Tensor, noise: Tensor | None, may_vanish: bool) -> bool:
    """Raise unless it is a gram up to rounding; returns whether it is exactly symmetric."""
    if gram.dim() != 2:
        message = f"gram is a square matrix, got shape {tuple(gram.shape)}"
        raise InvalidProblemError(message)
    _check_matrix(gram, "gram", gram.shape[1])
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        index = int(diagonal.argmin())
        message = f"gram has a negative diagonal: {float(diagonal[index])} at {index}"
        raise InvalidProblemError(message)
    if not may_vanish and not bool((diagonal > 0).any()):
        message = "gram is zero: every input is zero in every token"
        raise InvalidProblemError(message)
    root = (diagonal if noise is None else diagonal + noise).sqrt()
    symmetric = True
    for rows in slabs(len(gram)):  # no copy of a large gram
        part, bound = gram[rows], torch.outer(root[rows], root)
        apart = (part - gram[:, rows].T).abs()
        symmetric = symmetric and not bool(apart.any())
        wrong = apart > SLACK * bound
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            row += rows.start
            message = (
                f"gram is not symmetric: {float(gram[row, column])} at ({row}, {column}), "
                f"{float(gram[column, row])} at ({column}, {row})"
            )
            raise InvalidProblemError(message)
        wrong = part.abs() > (1 + SLACK) * bound
        if bool(wrong.any()):
            row, column = wrong.nonzero()[0].tolist()
            row += rows.start
            message = (
                f"gram is not positive semi-definite: |G[{row}, {column}]| exceeds "
                f"sqrt(G[{row}, {row}] G[{column}, {column}])"
            )
            raise InvalidProblemError(message)
    return symmetric

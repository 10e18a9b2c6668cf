"""Sums over the inputs of a layer, chunk by chunk, whose averages are moments.

Chunks of activations are scaled by a power of two, multiplied in float32 (float64 for
float64 inputs, see :mod:`layerwise.gram` for bfloat16) and summed in float64, so half
precision activations neither overflow nor lose their sums. The first few tokens are
multiplied in float64: weights can fit fewer tokens than channels with an error below the
rounding of float32, which would spoil the error that is reported. Channels far from zero
or far below the others keep their variance (:mod:`layerwise.shifted`).
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from layerwise.arrays import Array, check_integer, real_tensor
from layerwise.chunks import largest_of, slabs
from layerwise.errors import InvalidProblemError
from layerwise.fluctuation import RunningFluctuation
from layerwise.forms import row_forms
from layerwise.gram import add_gram, add_product, mirror_, mirrored, precision_of
from layerwise.linalg import ieee_products
from layerwise.moments import Moments, even_exponent
from layerwise.shifted import shifted

MAX_EXPONENT = 120  # 2 to this power is an ordinary number in float32
FEW_TOKENS = 1024  # in float64 at most: where calibration is real, they cost nothing


class MomentAccumulator:
    """Streaming moments of a dense and, where it differs, a pruned input stream.

    Parameters
    ----------
    width
        Number of input channels.
    weights
        The matrices that read these inputs, each (out, in). If a pruned stream is given,
        :meth:`drift` returns their drifts, which share one gram of the difference of the
        two streams, or cost a product each where that is cheaper.
    device
        Where the sums live; chunks are moved there.
    fluctuation
        Whether to collect the statistic of :mod:`layerwise.fluctuation` too.
    """

    def __init__(
        self,
        width: int,
        weights: Sequence[Array] = (),
        device: torch.device | str = "cpu",
        *,
        fluctuation: bool = False,
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.n_tokens = 0
        self._scale = 1.0
        check_integer(width, "width")
        self._weights = [real_tensor(weight, "weight").to(device) for weight in weights]
        self._gram, self._sum = zeros(width, width), zeros(width)
        self._cross: Tensor | None = None
        self._pruned_sum = zeros(width)
        outputs = sum(len(weight) for weight in self._weights)
        self._by_gram = sums_drift_gram(outputs, width)
        self._drift: Tensor | None = None
        self._mirrored = False
        self._drifts = [zeros(len(weight)) for weight in self._weights]
        self._fluctuation = RunningFluctuation(width, device) if fluctuation else None

    @ieee_products()
    def update(self, inputs: Array, pruned_inputs: Array | None = None) -> None:
        """Add tokens: inputs of shape (..., in) of the dense and of the pruned model.

        For the fluctuation, the second to last dimension runs over a sequence.
        """
        inputs = real_tensor(inputs, "inputs")
        dense, exponent = self._prepare(inputs, "inputs")
        if pruned_inputs is None:
            if self._cross is not None:
                message = "give pruned inputs to every update of an accumulator or to none"
                raise InvalidProblemError(message)
            chunk = shifted(dense)
            self._sum += _descale(chunk.sums(), exponent)
            add_gram(self._gram, chunk, 2.0 ** (2 * exponent))
        else:
            pruned_inputs = real_tensor(pruned_inputs, "pruned inputs")
            pruned, pruned_exponent = self._prepare(pruned_inputs, "pruned inputs")
            if pruned.shape != dense.shape:
                message = (
                    f"dense inputs have {dense.shape[0]} tokens, pruned inputs "
                    f"{pruned.shape[0]}"
                )
                raise InvalidProblemError(message)
            self._update_pair(dense, exponent, pruned, pruned_exponent)
        if self._fluctuation is not None:
            sequences = inputs if pruned_inputs is None else pruned_inputs
            self._fluctuation.update(sequences.to(self._gram))
        self.n_tokens += dense.shape[0]

    def _prepare(self, inputs: Tensor, name: str) -> tuple[Tensor, int]:
        """Chunk in its product precision, scaled to magnitude 1, and the exponent."""
        width = self._gram.shape[0]
        if inputs.dim() == 0 or inputs.shape[-1] != width:
            message = (
                f"{name} must be a tensor of shape (..., {width}), got shape "
                f"{tuple(inputs.shape)}"
            )
            raise InvalidProblemError(message)
        tokens = inputs.reshape(-1, width)
        largest = largest_of(tokens) if tokens.numel() else tokens.new_zeros(())
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
        few = self.n_tokens + len(tokens) <= min(width, FEW_TOKENS)
        precision = torch.float64 if few else precision_of(tokens.dtype, device)
        tokens = tokens.to(device, precision, copy=True)
        return tokens.mul_(2.0**-exponent), exponent

    def _update_pair(
        self, dense: Tensor, exponent: int, pruned: Tensor, pruned_exponent: int
    ) -> None:
        if self._cross is None:
            if self.n_tokens:
                message = "give pruned inputs to every update of an accumulator or to none"
                raise InvalidProblemError(message)
            self._cross = torch.zeros_like(self._gram)
        if self._weights:
            self._add_drift(dense, exponent, pruned, pruned_exponent)
        one, other = shifted(dense), shifted(pruned)
        self._sum += _descale(one.sums(), exponent)
        self._pruned_sum += _descale(other.sums(), pruned_exponent)
        add_gram(self._gram, other, 2.0 ** (2 * pruned_exponent))
        add_product(self._cross, one, other, 2.0 ** (exponent + pruned_exponent))

    def _add_drift(
        self, dense: Tensor, exponent: int, pruned: Tensor, pruned_exponent: int
    ) -> None:
        # the difference of two bfloat16 numbers is not a bfloat16 number
        precision = torch.promote_types(dense.dtype, torch.float32)
        other = _descale(pruned.to(precision), pruned_exponent - exponent)
        change, scale = shifted(other.neg_().add_(dense)), 2.0 ** (2 * exponent)
        if self._by_gram:
            if self._drift is None:
                self._drift = torch.zeros_like(self._gram)
            add_gram(self._drift, change, scale)
            self._mirrored = False
            return
        for weight, drift in zip(self._weights, self._drifts, strict=True):
            for rows in slabs(len(weight)):
                drift[rows].add_(change.output_squares(weight[rows]), alpha=scale)

    def add_over(self, add: Callable[[list[Tensor]], None]) -> None:
        """Add the sums of the accumulators of other processes, before the averages.

        Every process has accumulated its own part of the tokens, with pruned inputs in
        all processes or in none.

        Parameters
        ----------
        add
            An all-reduce: adds up tensors over the processes, in place. It gets float64
            sums of the same shapes in the same order everywhere.

        Raises
        ------
        InvalidProblemError
            If the fluctuation is collected, which is not a sum.
        """
        if self._fluctuation is not None:
            message = (
                "the fluctuation depends on the order of the sequences and cannot be added "
                "up: leave it out"
            )
            raise InvalidProblemError(message)
        count = self._sum.new_tensor([self.n_tokens])
        matrices = [m for m in (self._gram, self._cross, self._drift) if m is not None]
        add([*matrices, self._sum, self._pruned_sum, *self._drifts, count])
        self.n_tokens = int(count)

    def moments(self) -> Moments:
        """Return the averages over all tokens added so far."""
        n = self._count()
        cross = None if self._cross is None else self._cross / n
        return self._averages(mirrored(self._gram) / n, cross)

    def release(self) -> tuple[Moments, int]:
        """Return the averages times ``2^-k``, whose mean diagonal is near one, and k.

        The sums are scaled exactly and in place, so neither this method nor
        :func:`layerwise.solve` makes another gram. Nothing can be added afterwards, and
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
            summed=True,
            fluctuation=None if fluctuation is None else fluctuation.value() * self._scale,
        )

    def drift(self, index: int) -> Tensor | None:
        """Row sums of ``(W (X - Xhat))^2 / tokens`` of one matrix; None if Xhat = X."""
        if self._cross is None or not self._weights:
            return None
        if self._drift is None:
            rows = self._drifts[index]
        else:
            if not self._mirrored:
                mirror_(self._drift)
                self._mirrored = True
            rows = row_forms(self._weights[index], self._drift)
        return rows.clamp(min=0) / self.n_tokens * self._scale


def sums_drift_gram(outputs: int, width: int) -> bool:
    """Whether the drift comes from a gram: cheaper than products for many outputs.

    Parameters
    ----------
    outputs, width
        Number of rows of all matrices that read the inputs, and of input channels.
    """
    return 2 * outputs > width


def _descale(values: Tensor, exponent: int) -> Tensor:
    return values * 2.0**exponent

r"""Inputs as :math:`x = o + u v`, with values v whose products lose nothing in float32.

A product in float32 rounds at 1e-7 of the squared inputs. Where the mean of a channel is
many standard deviations, that is more than its variance; and the square of a channel that
is 1e-24 of the others is zero. So an offset o is subtracted from the first kind, which is
exact, and the second kind is multiplied by a power of two, 1 / u. With sums s over n tokens

.. math:: \sum_t x_t y_t^\top = u_x u_y^\top \odot \sum_t v_t w_t^\top
          + o_x s_y^\top + (s_x - n\, o_x)\, o_y^\top,

the last two terms in float64. Other channels have o = 0 and u = 1, and keep their bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.chunks import column_sums, slabs

SMALL = 2.0**-40  # of the largest input; the square of its 2^-20 still is ordinary


@dataclass(frozen=True, eq=False)
class Shifted:
    """A chunk of tokens in units of its largest input.

    Parameters
    ----------
    values
        v, shape (n, in), in the precision of the products.
    offset
        o, shape (in,), float64; None if it is zero.
    unit
        u, shape (in,), float64, powers of two; None if it is one.
    """

    values: Tensor
    offset: Tensor | None = None
    unit: Tensor | None = None

    def sums(self) -> Tensor:
        """Sums over the tokens, (in,), float64."""
        sums = column_sums(self.values)
        if self.unit is not None:
            sums = sums * self.unit
        return sums if self.offset is None else sums + len(self.values) * self.offset

    def output_squares(self, weight: Tensor) -> Tensor:
        """Sums over the tokens of the squared outputs of a weight (out, in), (out,)."""
        matrix = weight.to(self.values.dtype)
        if self.unit is not None:
            matrix = (weight.double() * self.unit).to(matrix)
        outputs = self.values @ matrix.T
        if self.offset is None:
            return column_sums(outputs.square_())
        middle = weight.double() @ self.offset
        double = 2 * middle * column_sums(outputs)
        squares = column_sums(outputs.square_())
        return squares + double + len(outputs) * middle.square()


def shifted(tokens: Tensor) -> Shifted:
    """Write tokens (n, in), at most 1 in size, as offset and values; may change them.

    A channel has an offset if its largest value is below twice its smallest one, both of
    one sign: then the subtraction of their middle is exact (Sterbenz). bfloat16 has no room
    for differences, so there only a constant channel has an offset.
    """
    if tokens.dtype == torch.float64 or len(tokens) == 0:
        return Shifted(tokens)
    lowest, highest = tokens.amin(dim=0), tokens.amax(dim=0)  # faster than aminmax
    near, far = lowest.abs(), highest.abs()
    smallest, largest = torch.minimum(near, far), torch.maximum(near, far)
    together = (lowest.sign() == highest.sign()) & (largest > 0)
    half = tokens.dtype == torch.bfloat16
    together &= (lowest == highest) if half else (largest < 2 * smallest)
    offset = unit = None
    if bool(together.any()):
        middle = torch.where(together, lowest + (highest - lowest) / 2, 0)
        tokens.sub_(middle)
        offset, largest = middle.double(), torch.where(together, highest - middle, largest)
    small = (largest > 0) & (largest < SMALL)
    if bool(small.any()) and not half:
        exponent = torch.where(small, torch.frexp(largest).exponent, 0)
        tokens[:, small] = torch.ldexp(tokens[:, small].double(), -exponent[small]).to(
            tokens
        )
        unit = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponent)
    return Shifted(tokens, offset, unit)


def add_offsets(total: Tensor, left: Shifted, right: Shifted, scale: float) -> None:
    """Add the terms of the offsets to a sum of products, shape (a, b), float64."""
    if left.offset is None and right.offset is None:
        return
    zero = total.new_zeros(())
    count = len(left.values)
    one = (zero if left.offset is None else left.offset).expand(len(total))
    other = (zero if right.offset is None else right.offset).expand(total.shape[1])
    sums, rest = right.sums(), left.sums() - count * one
    for rows in slabs(len(total)):
        total[rows].addr_(one[rows], sums, alpha=scale)
        total[rows].addr_(rest[rows], other, alpha=scale)

"""The statistic that FLAP's published code computes in place of the paper's variance.

For sequences k = 1 .. N, let ``m_k`` be the running mean after sequence k, that is, the
mean over the first k sequences. Then

    fluctuation_j = sum_{k = 2 .. N} sum_t (x_tj - m_kj)^2 / N

The mean is taken after the update instead of before it, the first sequence counts zero, and
a sum over tokens is divided by a number of sequences. The statistic depends on the order of
the sequences. Its only use is to reproduce published choices; the variance itself follows
from the gram and the means.
"""

import torch
from torch import Tensor


class RunningFluctuation:
    """Fluctuation of a stream of sequences, from running sums.

    Parameters
    ----------
    width
        Number of channels.
    device
        Where the sums live.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.n_sequences = 0
        self._mean = torch.zeros(width, dtype=torch.float64, device=device)
        self._total = torch.zeros_like(self._mean)

    def update(self, sequences: Tensor) -> None:
        """Add sequences of shape (..., length, width), float64; a vector is one token."""
        length = sequences.shape[-2] if sequences.dim() > 1 else 1
        sequences = sequences.reshape(-1, length, len(self._mean))
        sums, squares = sequences.sum(dim=1), sequences.square().sum(dim=1)
        for total, square in zip(sums, squares, strict=True):
            self.n_sequences += 1
            self._mean += (total / length - self._mean) / self.n_sequences
            if self.n_sequences > 1:
                around = square - 2 * self._mean * total + length * self._mean.square()
                self._total += around.clamp(min=0)

    def value(self) -> Tensor:
        """Fluctuation of every channel, shape (width,)."""
        return self._total / max(1, self.n_sequences)

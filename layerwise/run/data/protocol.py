"""Protocols of perplexity: how a text is cut into windows, and which tokens are scored.

*Contiguous* windows have no overlap and are scored on their own, as in the pruning papers.
*Sliding* windows begin every `stride` tokens, and only the tokens that no window before has
scored count, as in the documentation of transformers [1]_. Both may begin with BOS.

References
----------
.. [1] "Perplexity of fixed-length models", documentation of transformers. The loss of a
   window is weighted there by its new tokens less one, also where all of them are scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layerwise.errors import DataError, UsageError
from layerwise.run.data.tokens import without_first


@dataclass(frozen=True, eq=False)
class Window:
    """A window, shape (tokens,), how many of its last tokens are scored, and its weight."""

    tokens: Tensor
    scored: int
    weight: int


@dataclass(frozen=True)
class Protocol:
    """How a text is cut and scored.

    Parameters
    ----------
    length
        Tokens of a window, with BOS.
    stride
        Tokens of text between the beginnings of two windows; None for contiguous windows.
    bos
        Token in front of every window, or None.

    Raises
    ------
    UsageError
        A number is impossible.
    """

    length: int
    stride: int | None = None
    bos: int | None = None

    def __post_init__(self) -> None:
        if self.length < 2:
            message = f"sequence_length is {self.length}: it must be at least 2"
            raise UsageError(message)
        if self.stride is not None and not 1 <= self.stride <= self.text_length:
            message = (
                f"stride is {self.stride}: choose one from 1 to {self.text_length}, the "
                f"tokens of text in a window"
            )
            raise UsageError(message)

    @property
    def text_length(self) -> int:
        """Tokens of text in a window."""
        return self.length - (self.bos is not None)

    @property
    def name(self) -> str:
        """Name for reports."""
        kind = "contiguous" if self.stride is None else f"sliding by {self.stride}"
        return kind if self.bos is None else f"{kind}, each begins with BOS"

    def windows(self, text: Tensor) -> list[Window]:
        """Windows of a text.

        Raises
        ------
        DataError
            The text is shorter than one window.
        """
        text = without_first(text.to(torch.int64), self.bos)
        if len(text) < self.text_length:
            message = (
                f"the text has {len(text)} tokens, one window needs {self.text_length}: "
                f"give more text or lower sequence_length"
            )
            raise DataError(message)
        return list(self._contiguous(text) if self.stride is None else self._sliding(text))

    def _contiguous(self, text: Tensor) -> Iterator[Window]:
        step = self.text_length
        for begin in range(0, len(text) - step + 1, step):
            yield self._window(text[begin : begin + step], step)

    def _sliding(self, text: Tensor) -> Iterator[Window]:
        assert self.stride is not None
        scored = 0
        for begin in range(0, len(text), self.stride):
            end = min(begin + self.text_length, len(text))
            window = self._window(text[begin:end], end - scored)
            if window.scored:  # a token alone has none before it
                yield window
            scored = end
            if end == len(text):
                return

    def _window(self, text: Tensor, new: int) -> Window:
        """Window of which the last `new` tokens of text have not been scored."""
        if self.bos is None:
            return Window(text, min(new, len(text) - 1), new - 1)
        return Window(torch.cat([text.new_tensor([self.bos]), text]), new, new)

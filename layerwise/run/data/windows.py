"""Windows: token sequences of equal length, cut out of texts and ids.

As in the papers, they are drawn at random positions of one long token stream. For C4, each
is drawn at a random position of a random document that is longer than a window. Sequences
of token ids are windows already. With BOS, a window is BOS and the tokens of a shorter one,
so its length is the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.errors import DataError, UsageError, one_line
from layerwise.run.data.bos import Bos
from layerwise.run.data.items import described
from layerwise.run.data.texts import Text
from layerwise.run.data.tokens import check_token_ids, encode, with_first, without_first

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
MOST_TOKENS = 1 << 28  # of all windows; their ids alone take 2 GiB
MANY_TIMES = 4  # windows that read a text so often are worth a remark
CHARACTERS = 32  # of a text, for every token of the windows: enough to draw from


class Request:
    """Checked number and length of the windows, with the random generator."""

    def __init__(
        self,
        n_sequences: int,
        length: int,
        seed: int,
        vocab_size: int | None = None,
        bos: Bos | None = None,
    ) -> None:
        check_windows(n_sequences, length, seed)
        self.n_sequences = n_sequences
        self.length = length
        self.vocab_size = vocab_size
        self.bos = bos or Bos()
        self.notes: list[str] = []
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def characters(self) -> int:
        """Characters of text that are enough for the windows."""
        return CHARACTERS * self.n_sequences * self.length

    def draw(self, limit: int, count: int) -> list[int]:
        """``count`` random integers from 0 to ``limit`` - 1."""
        draws = torch.randint(limit, (count,), generator=self._generator)
        return [int(draw) for draw in draws]

    def shuffled(self, count: int) -> list[int]:
        """Return the integers below ``count`` in random order."""
        return torch.randperm(count, generator=self._generator).tolist()


def check_windows(n_sequences: int, length: int, seed: int) -> None:
    """Refuse impossible numbers with a UsageError."""
    names = {"n_sequences": n_sequences, "sequence_length": length, "seed": seed}
    for name, value in names.items():
        if not isinstance(value, Integral) or isinstance(value, bool):
            message = f"{name} is {value!r}: it must be an integer"
            raise UsageError(message)
    if n_sequences < 1:
        message = f"n_sequences is {n_sequences}: at least 1 window is needed"
        raise UsageError(message)
    if length < 2:
        message = f"sequence_length is {length}: at least 2 tokens are needed"
        raise UsageError(message)
    if n_sequences * length > MOST_TOKENS:
        message = (
            f"{n_sequences} windows of {length} tokens are more than {MOST_TOKENS} tokens: "
            f"lower n_sequences or sequence_length"
        )
        raise UsageError(message)
    if not 0 <= seed < 2**63:
        message = f"seed is {seed}: choose one from 0 to 2**63 - 1"
        raise UsageError(message)


def text_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, request: Request
) -> Tensor:
    """Windows of a text, shape (n_sequences, length)."""
    if text.windows == "documents":
        return _document_windows(text, tokenizer, request)
    stream = encode(text.joined(), tokenizer, request.vocab_size)
    return _drawn(stream, request, text.description)


def stream_windows(ids: Any, request: Request) -> Tensor:
    """Windows of one stream of token ids."""
    where = "the token stream"
    return _drawn(as_ids(ids, request.vocab_size, where), request, where)


def given_windows(sequences: Iterable[Any], request: Request) -> Tensor:
    """Return the first sequences of token ids, cut to the length of a window."""
    rows: list[Tensor] = []
    for number, row in enumerate(sequences):
        tokens = as_ids(row, request.vocab_size, f"sequence {number}")
        tokens = with_first(tokens, request.bos.of_given)
        if len(tokens) < request.length:
            message = (
                f"sequence {number} has {len(tokens)} tokens, {request.length} are "
                f"needed: join short sequences or lower sequence_length"
            )
            raise DataError(message)
        rows.append(tokens[: request.length])
        if len(rows) == request.n_sequences:
            return torch.stack(rows)
    message = (
        f"there are {len(rows)} token sequences, {request.n_sequences} are needed: "
        f"give more or lower n_sequences"
    )
    raise DataError(message)


def _drawn(stream: Tensor, request: Request, where: str) -> Tensor:
    """Windows at random positions of one token stream."""
    first = request.bos.of_drawn
    stream = without_first(stream, first)
    length = request.length - (first is not None)
    limit = len(stream) - length + 1
    if limit < 1:
        message = (
            f"{where} has {len(stream)} tokens, a window needs {length}: give "
            f"more text or lower sequence_length"
        )
        raise DataError(message)
    times = request.n_sequences * length / len(stream)
    if times >= MANY_TIMES:
        request.notes.append(
            f"{where} has {len(stream)} tokens: {request.n_sequences} windows of "
            f"{length} overlap, and read it {times:.0f} times; give more text or fewer "
            f"windows"
        )
    starts = request.draw(limit, request.n_sequences)
    drawn = torch.stack([stream[start : start + length] for start in starts])
    return _with_column(drawn, first)


def _document_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, request: Request
) -> Tensor:
    """One window from each of ``n_sequences`` random documents that are long enough."""
    first = request.bos.of_drawn
    length = request.length - (first is not None)
    windows: list[Tensor] = []
    for index in request.shuffled(len(text.documents)):
        tokens = encode(text.documents[index], tokenizer, request.vocab_size)
        tokens = without_first(tokens, first)
        if len(tokens) > length:
            start = request.draw(len(tokens) - length + 1, 1)[0]
            windows.append(tokens[start : start + length])
        if len(windows) == request.n_sequences:
            return _with_column(torch.stack(windows), first)
    message = (
        f"{text.description}: {len(windows)} documents are longer than {length} "
        f"tokens, {request.n_sequences} are needed: lower n_sequences or "
        f"sequence_length"
    )
    raise DataError(message)


def _with_column(windows: Tensor, first: int | None) -> Tensor:
    """Windows with a token in front of each."""
    if first is None:
        return windows
    return torch.cat([windows.new_full((len(windows), 1), first), windows], dim=1)


def as_ids(values: Any, vocab_size: int | None, where: str) -> Tensor:
    """Check the ids of one sequence, shape (tokens,) or (1, tokens), and flatten."""
    try:
        tokens = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        message = (
            f"{where} is {described(values)} and does not consist of token ids: "
            f"{one_line(error)}"
        )
        raise UsageError(message) from error
    if tokens.dim() == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.dim() != 1 or tokens.dtype not in INTEGERS:
        message = (
            f"{where} is {tokens.dtype} of shape {tuple(tokens.shape)}: token ids are "
            f"integers, one dimension per sequence"
        )
        raise UsageError(message)
    check_token_ids(tokens, vocab_size, where)
    return tokens.to("cpu", torch.int64)

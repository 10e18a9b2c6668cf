"""Calibration: token windows from any text or token ids, seeded and hashed.

The statistics of every layer come from a few hundred windows of equal length. As in the
papers, they are drawn at random positions of one long token stream. For C4, each is drawn
at a random position of a random document that is longer than a window. The generator is
local, and the hash of the tokens identifies the calibration set in a manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.errors import DataError, UsageError, one_line
from layerwise.run.data.texts import Text, read_text
from layerwise.run.data.tokens import check_token_ids, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING = "the calibration source is empty: give text or token ids"
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)

TextSource = str | os.PathLike[str] | Iterable[str]
TokenSource = Tensor | Iterable[int] | Iterable[Sequence[int]] | Iterable[Tensor]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Token windows and their source.

    Attributes
    ----------
    tokens
        Token ids, shape (n_sequences, sequence_length), int64.
    source
        Description of the source.
    sha256
        Hash of the ids as little-endian 64-bit integers in row-major order.
    """

    tokens: Tensor
    source: str
    sha256: str


def token_windows(
    source: TextSource | TokenSource,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    n_sequences: int = 128,
    sequence_length: int,
    seed: int = 0,
    vocab_size: int | None = None,
) -> Calibration:
    """Draw the calibration windows from a text or from token ids.

    Parameters
    ----------
    source
        Text: ``"wikitext2"``, ``"c4"``, ``"file.txt"``, ``"file.jsonl:field"`` or a list
        of strings. A one-dimensional stream of token ids: windows are drawn from it.
        Sequences of token ids (two-dimensional): the first ``n_sequences`` sequences,
        cut to ``sequence_length``; nothing is drawn.
    tokenizer
        Tokenizer of the model; None for token ids.
    n_sequences, sequence_length
        Shape of the result.
    seed
        Seed of a local generator; the global one is not used.
    vocab_size
        Number of rows of the model's embedding, to check every id.

    Returns
    -------
    Calibration
        The same arguments give the same windows.

    Raises
    ------
    UsageError
        A number is impossible, the source is unknown or the tokenizer is missing.
    DataError
        The source is missing, damaged, too short, or has impossible token ids.
    """
    request = _Request(n_sequences, sequence_length, seed, vocab_size)
    material = _classify(source)
    if isinstance(material, Text):
        if tokenizer is None:
            message = f"{material.description} needs a tokenizer: pass one"
            raise UsageError(message)
        description = material.description
        if material.windows == "documents":
            tokens = _document_windows(material, tokenizer, request)
        else:
            stream = encode(material.joined(), tokenizer, vocab_size)
            tokens = _stream_windows(stream, request, description)
    else:
        description = "token ids"
        tokens = _id_windows(material, request)
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return Calibration(tokens, description, digest)


def evaluation_text(source: TextSource) -> str:
    """One string to evaluate on, from the same sources as calibration text.

    ``wikitext2`` is its test split joined by two newlines, ``c4`` the first 1100
    validation documents joined by a space (the papers use its first 256 windows).
    """
    if not isinstance(source, (str, os.PathLike)):
        source = list(source)
    return read_text(source, "evaluation").joined()


def check_windows(n_sequences: int, length: int, seed: int) -> None:
    """Refuse impossible numbers with a UsageError."""
    if n_sequences < 1:
        message = f"n_sequences is {n_sequences}: at least 1 window is needed"
        raise UsageError(message)
    if length < 2:
        message = f"sequence_length is {length}: at least 2 tokens are needed"
        raise UsageError(message)
    if not 0 <= seed < 2**63:
        message = f"seed is {seed}: choose one from 0 to 2**63 - 1"
        raise UsageError(message)


class _Request:
    """Checked number and length of the windows, with the random generator."""

    def __init__(
        self, n_sequences: int, length: int, seed: int, vocab_size: int | None
    ) -> None:
        check_windows(n_sequences, length, seed)
        self.n_sequences = n_sequences
        self.length = length
        self.vocab_size = vocab_size
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, limit: int, count: int) -> list[int]:
        """``count`` random integers from 0 to ``limit`` - 1."""
        draws = torch.randint(limit, (count,), generator=self.generator)
        return [int(draw) for draw in draws]


def _classify(source: TextSource | TokenSource) -> Text | Iterable[Any]:
    """Text, or an iterable of token ids or of sequences of token ids."""
    if isinstance(source, (str, os.PathLike)):
        return read_text(source, "train")
    if not isinstance(source, Iterable):
        kind = type(source).__name__
        message = f"type {kind} is not a calibration source: pass text or token ids"
        raise UsageError(message)
    if isinstance(source, Tensor):
        return source
    items: Iterator[Any] = iter(source)
    first = next(items, None)
    if first is None:
        raise DataError(NOTHING)
    rest = itertools.chain([first], items)
    return read_text(list(rest), "train") if isinstance(first, str) else rest


def _stream_windows(stream: Tensor, request: _Request, where: str) -> Tensor:
    """Windows at random positions of one token stream."""
    limit = len(stream) - request.length + 1
    if limit < 1:
        message = (
            f"{where} has {len(stream)} tokens, a window needs {request.length}: give "
            f"more text or lower sequence_length"
        )
        raise DataError(message)
    starts = request.draw(limit, request.n_sequences)
    return torch.stack([stream[start : start + request.length] for start in starts])


def _document_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, request: _Request
) -> Tensor:
    """One window from each of ``n_sequences`` random documents that are long enough."""
    length = request.length
    windows: list[Tensor] = []
    order = torch.randperm(len(text.documents), generator=request.generator)
    for index in order:
        tokens = encode(text.documents[int(index)], tokenizer, request.vocab_size)
        if len(tokens) > length:
            start = request.draw(len(tokens) - length + 1, 1)[0]
            windows.append(tokens[start : start + length])
        if len(windows) == request.n_sequences:
            return torch.stack(windows)
    message = (
        f"{text.description}: {len(windows)} documents are longer than {length} "
        f"tokens, {request.n_sequences} are needed: lower n_sequences or "
        f"sequence_length"
    )
    raise DataError(message)


def _id_windows(ids: Iterable[Any], request: _Request) -> Tensor:
    """Windows of a one-dimensional stream, or the first rows of two dimensions."""
    where = "the token stream"
    if isinstance(ids, Tensor) and ids.dim() == 1:
        return _stream_windows(_as_ids(ids, request, where), request, where)
    items = iter(ids)
    first = next(items, None)
    if first is None:
        raise DataError(NOTHING)
    if isinstance(first, Integral) or (isinstance(first, Tensor) and not first.dim()):
        stream = _as_ids([first, *items], request, where)
        return _stream_windows(stream, request, where)
    rows: list[Tensor] = []
    for number, row in enumerate(itertools.chain([first], items)):
        tokens = _as_ids(row, request, f"sequence {number}")
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


def _as_ids(values: Any, request: _Request, where: str) -> Tensor:
    """Check the ids of one sequence, shape (tokens,) or (1, tokens), and flatten."""
    try:
        tokens = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{where} does not consist of token ids: {one_line(error)}"
        raise UsageError(message) from error
    if tokens.dim() == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.dim() != 1 or tokens.dtype not in INTEGERS:
        message = (
            f"{where} is {tokens.dtype} of shape {tuple(tokens.shape)}: token ids are "
            f"integers, one dimension per sequence"
        )
        raise UsageError(message)
    check_token_ids(tokens, request.vocab_size, where)
    return tokens.to("cpu", torch.int64)

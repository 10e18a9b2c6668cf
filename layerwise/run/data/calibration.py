"""Calibration: token windows from any text or token ids, seeded and hashed.

The statistics of every layer come from a few hundred windows of equal length, see
:mod:`layerwise.run.data.windows`. The generator is local, and the hash of the tokens
identifies the calibration set in a manifest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.run.data.bos import Bos
from layerwise.run.data.material import Material, material_of
from layerwise.run.data.tokens import check_token_ids
from layerwise.run.data.windows import (
    Request,
    check_windows,
    given_windows,
    stream_windows,
    text_windows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Calibration", "check_windows", "cut", "token_windows"]

TextSource = str | os.PathLike[str] | Iterable[str]
TokenSource = (
    Tensor | Iterable[int] | Iterable[Sequence[int]] | Iterable[Tensor] | Mapping[str, Any]
)


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
    bos
        BOS in front of every window; None if none was put there.
    notes
        Remarks for the log.
    """

    tokens: Tensor
    source: str
    sha256: str
    bos: int | None = None
    notes: tuple[str, ...] = ()


def token_windows(
    source: TextSource | TokenSource | Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    n_sequences: int = 128,
    sequence_length: int,
    seed: int = 0,
    vocab_size: int | None = None,
    bos: Bos | None = None,
) -> Calibration:
    """Draw the calibration windows from a text or from token ids.

    Parameters
    ----------
    source
        Text: ``"wikitext2"``, ``"c4"``, a file (see :mod:`layerwise.run.data.files`),
        strings, or chats: lists of messages. A one-dimensional stream of token ids:
        windows are drawn from it. Sequences of token ids (two-dimensional): the first
        ``n_sequences`` sequences, cut to ``sequence_length``; nothing is drawn. Elements
        may be dicts with ``input_ids``, ``messages`` or ``text``, batches, or pairs of
        input and target, so that data sets and DataLoaders are taken as they are.
    tokenizer
        Tokenizer of the model; None for token ids.
    n_sequences, sequence_length
        Shape of the result.
    seed
        Seed of a local generator; the global one is not used.
    vocab_size
        Number of rows of the model's embedding, to check every id.
    bos
        Whether every window begins with BOS; by default none is put there.

    Returns
    -------
    Calibration
        The same arguments give the same windows.

    Raises
    ------
    UsageError
        A number is impossible, the source is not understood or the tokenizer is missing.
    DataError
        The source is missing, damaged, too short, or has impossible token ids.
    """
    request = Request(n_sequences, sequence_length, seed, vocab_size, bos)
    with torch.random.fork_rng(devices=[]):  # a DataLoader draws its seed from there
        material = material_of(source, "train", request.characters)
        return cut(material, tokenizer, request)


def cut(
    material: Material, tokenizer: PreTrainedTokenizerBase | None, request: Request
) -> Calibration:
    """Cut the windows out of what a source holds."""
    first = request.bos.of_drawn
    if material.needs_tokenizer:
        text = material.text(tokenizer)
        assert tokenizer is not None  # or the text is refused
        tokens = text_windows(text, tokenizer, request)
    elif material.kind == "stream":
        tokens = stream_windows(material.content, request)
    else:
        first = request.bos.of_given
        tokens = given_windows(material.content, request)
    check_token_ids(tokens[:, :1], request.vocab_size, "the windows")
    notes = [
        *request.notes,
        *request.bos.notes(tokens[:, 0].tolist(), put=first is not None),
    ]
    digest = hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()
    return Calibration(tokens, material.description, digest, first, tuple(notes))

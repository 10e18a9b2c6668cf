"""Evaluation text: the sources of calibration, as one stream of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.run.data.items import EXPECTED
from layerwise.run.data.material import material_of
from layerwise.run.data.tokens import encode
from layerwise.run.data.windows import as_ids


def evaluation_text(source: Any) -> str:
    """One string to evaluate on, from the same sources as calibration text.

    ``wikitext2`` is its test split joined by two newlines, ``c4`` the first 1100
    validation documents joined by a space (the papers use its first 256 windows).

    Raises
    ------
    UsageError
        The source does not hold text.
    DataError
        The source is empty, missing or damaged.
    """
    material = material_of(source, "evaluation")
    if material.kind != "text":
        message = f"{material.description} is {material.kind}, not text: give {EXPECTED}"
        raise UsageError(message)
    joined: str = material.content.joined()
    return joined


def evaluation_tokens(source: Any, tokenizer: Any, vocab_size: int | None = None) -> Tensor:
    """Token ids to evaluate on, shape (tokens,); sequences of ids are joined.

    Parameters
    ----------
    source
        As for :func:`layerwise.run.data.calibration.token_windows`.
    tokenizer
        Tokenizer of the model; not used for token ids.
    vocab_size
        Number of rows of the model's embedding.

    Raises
    ------
    UsageError, DataError
        The source cannot be used.
    """
    material = material_of(source, "evaluation")
    if material.needs_tokenizer:
        return encode(material.text(tokenizer).joined(), tokenizer, vocab_size)
    if material.kind == "stream":
        return as_ids(material.content, vocab_size, "the token stream")
    rows = [
        as_ids(row, vocab_size, f"sequence {number}")
        for number, row in enumerate(material.content)
    ]
    return torch.cat(rows)

"""Token ids: encode text, and check that every id is in the model's vocabulary.

An id outside the vocabulary causes a bare index error deep inside a model, or a crash of
the device. The check raises an error with the id and its position.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.errors import DataError, one_line
from layerwise.run.data.growth import check_growth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PANIC = "PanicException"  # of the library tokenizers, not an Exception


def encode(
    text: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> Tensor:
    """Token ids of a whole text, shape (tokens,), int64, checked.

    The text is encoded in one piece, so that the tokenizer adds special tokens only at its
    ends. It may be longer than any model's context.
    """
    try:
        check_growth(text, tokenizer)
        encoded = tokenizer(text, verbose=False)["input_ids"]
        tokens = torch.as_tensor(encoded, dtype=torch.int64)
    except DataError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise  # an interruption
        message = (
            f"the tokenizer cannot encode the text: {one_line(error)}; check the tokenizer"
        )
        raise DataError(message) from error
    check_token_ids(tokens, vocab_size, "the tokenizer's output", tokenizer)
    return tokens


def without_first(tokens: Tensor, first: int | None) -> Tensor:
    """Return tokens without this one at their start; shape (tokens,)."""
    while first is not None and len(tokens) and int(tokens[0]) == first:
        tokens = tokens[1:]
    return tokens


def with_first(tokens: Tensor, first: int | None) -> Tensor:
    """Return tokens that begin with this one; shape (tokens,)."""
    if first is None or (len(tokens) and int(tokens[0]) == first):
        return tokens
    return torch.cat([tokens.new_tensor([first]), tokens])


def check_token_ids(
    tokens: Tensor, vocab_size: int | None, where: str, tokenizer: Any = None
) -> None:
    """Raise a DataError for the first id below 0 or at least ``vocab_size``.

    Parameters
    ----------
    tokens
        Integer ids of any shape.
    vocab_size
        Number of rows of the model's embedding; None checks the sign only.
    where
        Origin of the ids, for the message.
    tokenizer
        Tokenizer that knows the name of a token, if there is one.
    """
    wrong = tokens < 0
    if vocab_size is not None:
        wrong = wrong | (tokens >= vocab_size)
    if not bool(wrong.any()):
        return
    position = [int(index) for index in wrong.nonzero()[0]]
    number = int(tokens[tuple(position)])
    limit = "" if vocab_size is None else f" of {vocab_size} entries"
    name = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(number)!r})"
    message = (
        f"token id {number} at position "
        f"{', '.join(map(str, position))} of {where}{name} is outside the "
        f"vocabulary{limit}: use the tokenizer that belongs to the model"
    )
    raise DataError(message)

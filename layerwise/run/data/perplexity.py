"""Perplexity as the pruning papers measure it.

A long token stream is cut into windows of equal length without overlap, and the rest is
dropped. Every window is scored on its own, by the mean cross entropy of its
``sequence_length`` - 1 predicted tokens. The perplexity is the exponential of the mean over
the windows. It depends strongly on the window length: compare only equal lengths.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import DataError, SolveError, UsageError
from layerwise.modes import in_ordinary_mode
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.data.tokens import check_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@in_ordinary_mode
def perplexity(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    sequence_length: int,
    batch_size: int = 8,
) -> float:
    """Perplexity of a causal language model on a token stream.

    Parameters
    ----------
    model
        The model, on its device; scored in evaluation mode, restored afterwards.
    token_ids
        The tokenised text, shape (tokens,).
    sequence_length
        Tokens per window.
    batch_size
        Windows per forward pass; it changes the result only by rounding. Memory: logits
        (batch_size, sequence_length, vocabulary) in the model's type, and those of one
        window in float32.

    Returns
    -------
    float
        Perplexity, at least 1; infinite if it is too large for a float.

    Raises
    ------
    UsageError
        A number is impossible or exceeds the positions of the model.
    DataError
        There are too few tokens for one window, or impossible token ids.
    SolveError
        The model computes NaN.
    """
    try:
        return math.exp(
            mean_loss(
                model, token_ids, sequence_length=sequence_length, batch_size=batch_size
            )
        )
    except OverflowError:
        return math.inf


@in_ordinary_mode
def mean_loss(
    model: PreTrainedModel,
    token_ids: Tensor,  # (tokens,)
    *,
    sequence_length: int,
    batch_size: int = 8,
) -> float:
    """Logarithm of :func:`perplexity`: mean cross entropy of the next token."""
    windows = _windows(model, token_ids, sequence_length, batch_size)
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    with evaluation_mode(model), torch.no_grad():
        for batch in torch.split(windows, batch_size):
            logits = model(input_ids=batch.to(device), use_cache=False).logits
            for window, scores in zip(batch, logits, strict=True):
                loss = _mean_cross_entropy(scores[:-1], window[1:].to(scores.device))
                losses.append(_not_nan(loss.cpu(), len(losses)))
    return float(torch.stack(losses).mean())


def _windows(
    model: PreTrainedModel, token_ids: Tensor, length: int, batch_size: int
) -> Tensor:
    """Check the arguments; return windows without overlap, shape (windows, length)."""
    if length < 2 or batch_size < 1:
        message = (
            f"sequence_length is {length} and batch_size {batch_size}: they must be at "
            f"least 2 and 1"
        )
        raise UsageError(message)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        message = (
            f"sequence_length is {length} but the model has {positions} positions: lower it"
        )
        raise UsageError(message)
    if token_ids.dim() != 1:
        message = f"token_ids have shape {tuple(token_ids.shape)}: flatten them first"
        raise UsageError(message)
    if len(token_ids) < length:
        message = (
            f"the text has {len(token_ids)} tokens, one window needs {length}: give "
            f"more text or lower sequence_length"
        )
        raise DataError(message)
    embedding: Any = model.get_input_embeddings()
    check_token_ids(token_ids, len(embedding.weight), "the text")
    n_windows = len(token_ids) // length
    return token_ids[: n_windows * length].to(torch.int64).reshape(n_windows, length)


def _mean_cross_entropy(scores: Tensor, following: Tensor) -> Tensor:
    """Mean over positions, in float64, of float32 losses; scores (positions, vocab)."""
    losses = nn.functional.cross_entropy(scores.float(), following, reduction="none")
    return losses.double().mean()


def _not_nan(loss: Tensor, window: int) -> Tensor:
    if bool(loss.isnan()):
        message = (
            f"logits are not finite in window {window}: the model computes NaN, "
            f"evaluate it in float32 or check its weights"
        )
        raise SolveError(message)
    return loss

"""Perplexity as the pruning papers measure it.

A long token stream is cut into windows of equal length without overlap, and the rest is
dropped. Every window is scored on its own, by the mean cross entropy of its
``sequence_length`` - 1 predicted tokens. The perplexity is the exponential of the mean over
the windows. It depends strongly on the window length: compare only equal lengths. Windows
that begin with BOS, or that overlap, are other protocols: see
:mod:`layerwise.run.data.protocol`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from layerwise.errors import SolveError, UsageError
from layerwise.modes import in_ordinary_mode
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.data.context import context_length
from layerwise.run.data.protocol import Protocol, Window
from layerwise.run.data.tokens import check_token_ids
from layerwise.run.steps import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@in_ordinary_mode
def perplexity(
    model: PreTrainedModel,
    token_ids: Tensor,
    *,
    sequence_length: int,
    batch_size: int = 8,
    stride: int | None = None,
    bos: int | None = None,
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
    stride
        Tokens between the beginnings of two windows; by default they do not overlap.
    bos
        Token in front of every window, as one of its tokens; by default none is put.

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
                model,
                token_ids,
                sequence_length=sequence_length,
                batch_size=batch_size,
                stride=stride,
                bos=bos,
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
    stride: int | None = None,
    bos: int | None = None,
) -> float:
    """Logarithm of :func:`perplexity`: mean cross entropy of the next token."""
    protocol = Protocol(sequence_length, stride, bos)
    windows = _windows(model, token_ids, protocol, batch_size)
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    with evaluation_mode(model), torch.no_grad():
        batches = list(_batches(windows, batch_size))
        text = f"perplexity of {len(windows)} windows"
        for batch in counted(batches, len(batches), text):
            ids = torch.stack([window.tokens for window in batch]).to(device)
            logits = model(input_ids=ids, use_cache=False).logits
            for window, scores in zip(batch, logits, strict=True):
                following = window.tokens[-window.scored :].to(scores.device)
                loss = _mean_cross_entropy(scores[-window.scored - 1 : -1], following)
                losses.append(_not_nan(loss.cpu(), len(losses)))
    if stride is None:
        return float(torch.stack(losses).mean())
    weights = torch.tensor([window.weight for window in windows], dtype=torch.float64)
    return float(torch.stack(losses) @ weights / weights.sum())


def _batches(windows: list[Window], size: int) -> Iterator[list[Window]]:
    """Batches of windows of equal length: a sliding one may be shorter at the end."""
    for _, equal in groupby(windows, lambda window: len(window.tokens)):
        while batch := list(islice(equal, size)):
            yield batch


def _windows(
    model: PreTrainedModel, token_ids: Tensor, protocol: Protocol, batch_size: int
) -> list[Window]:
    """Check the arguments; return the windows."""
    if batch_size < 1:
        message = f"batch_size is {batch_size}: it must be at least 1"
        raise UsageError(message)
    positions = context_length(model.config)
    if positions is not None and protocol.length > positions:
        message = (
            f"sequence_length is {protocol.length} but the model has {positions} "
            f"positions: lower it"
        )
        raise UsageError(message)
    if token_ids.dim() != 1:
        message = f"token_ids have shape {tuple(token_ids.shape)}: flatten them first"
        raise UsageError(message)
    windows = protocol.windows(token_ids)
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    check_token_ids(token_ids, rows, "the text")
    if protocol.bos is not None:
        check_token_ids(token_ids.new_tensor([protocol.bos]), rows, "BOS")
    return windows


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

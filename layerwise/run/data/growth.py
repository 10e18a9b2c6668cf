"""Bounds on a tokenizer: what it makes of a text, and how long it takes.

The file of a tokenizer may replace a letter by a long string, several times over, so that a
page of text needs all memory, or hold an expression that takes hours. Neither can be
stopped once the library is at work. Therefore the replacements are followed step by step on
short pieces of the text, and short beginnings of it are encoded before all of it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from layerwise.errors import DataError

PIECE = 4096  # characters that are normalized at once
GROWTH = 32  # times that a piece may become longer
LONGEST = 1000  # characters of a replacement
REPLACING = ("Replace", "Prepend")  # normalizers that write text of their own
BEGINNINGS = (4, 16, 64, 256, 1024)  # characters that are encoded before all of the text
PATIENCE = 1.0  # seconds for one of them
EMPTY = {"type": "BPE", "vocab": {}, "merges": []}


def check_growth(text: str, tokenizer: Any) -> None:
    """Refuse a tokenizer that makes a text much longer, or takes very long.

    Parameters
    ----------
    text
        The text that will be encoded.
    tokenizer
        A tokenizer of transformers.

    Raises
    ------
    DataError
        The tokenizer is not usable for this text.
    """
    stages = [
        _normalizer(stage) for stage in _replacing(_normalizer_state(tokenizer)) if stage
    ]
    for begin in range(0, len(text) if stages else 0, PIECE):
        _check_piece(text[begin : begin + PIECE], stages)
    for length in BEGINNINGS:
        start = time.perf_counter()
        tokenizer(text[:length], verbose=False)
        seconds = time.perf_counter() - start
        if seconds > PATIENCE:
            message = (
                f"the tokenizer needs {seconds:.1f} s for {min(length, len(text))} "
                f"characters: check the expressions in its tokenizer.json"
            )
            raise DataError(message)


def _check_piece(piece: str, stages: list[Any]) -> None:
    """Follow a piece of text through the normalizers."""
    most = GROWTH * len(piece) + LONGEST * len(stages)
    for stage in stages:
        piece = stage.normalize_str(piece)
        if len(piece) > most:
            message = (
                f"the normalizer of the tokenizer makes {most} characters or more of "
                f"{PIECE}: check the replacements in its tokenizer.json"
            )
            raise DataError(message)


def _normalizer_state(tokenizer: Any) -> Mapping[str, Any]:
    """Description of the normalizer of a fast tokenizer; empty if there is none."""
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None:
        return {}
    try:
        state: Mapping[str, Any] = json.loads(normalizer.__getstate__())
    except Exception:  # one that is written in Python
        return {}
    return state


def _replacing(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Normalizers in order, if one of them writes text of its own."""
    stages = list(_flat(state))
    if not any(stage.get("type") in REPLACING for stage in stages):
        return []
    for stage in stages:
        written = [stage.get("content"), stage.get("prepend")]
        if any(isinstance(text, str) and len(text) > LONGEST for text in written):
            message = (
                f"the normalizer of the tokenizer writes more than {LONGEST} characters "
                f"at once: check the replacements in its tokenizer.json"
            )
            raise DataError(message)
    return stages


def _flat(state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Normalizers of a sequence, which may hold sequences."""
    if state.get("type") != "Sequence":
        yield state
        return
    for stage in state["normalizers"]:
        yield from _flat(stage)


def _normalizer(state: Mapping[str, Any]) -> Any:
    """Normalizer of a description, on its own."""
    from tokenizers import Tokenizer

    whole = {"version": "1.0", "added_tokens": [], "normalizer": state, "model": EMPTY}
    return Tokenizer.from_str(json.dumps(whole)).normalizer

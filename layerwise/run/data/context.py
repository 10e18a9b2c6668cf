"""Context length: how many tokens a model can read at once, by any name."""

from __future__ import annotations

from typing import Any

# names of the context length in configurations, first the common one
NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "seq_len",
    "context_length",
    "n_ctx",
)


def context_length(config: Any) -> int | None:
    """Longest sequence of the text part of a model; None if its length is not limited.

    Parameters
    ----------
    config
        Configuration of the model. A value of zero or less means that there is no limit.
    """
    get_text = getattr(config, "get_text_config", None)
    text = config if get_text is None else get_text(decoder=True)
    values = (getattr(text, name, None) for name in NAMES)
    return next((v for v in values if type(v) is int and v > 0), None)

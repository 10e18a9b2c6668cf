"""BOS: the token that marks the beginning of a text, in front of every window.

The pruning papers tokenize the whole text and cut windows out of it, so at most one window
begins with BOS. That is the protocol of the field, here called *contiguous*. Some families
saw BOS at the start of every sequence of their training, and fall apart without it: their
windows begin with it, and hold one token of text less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from layerwise.errors import UsageError

BosMode = Literal["auto", "always", "never"]
BOS_MODES: tuple[str, ...] = get_args(BosMode)
# Families that need BOS, by their type in config.json, and why. The figures are published
# perplexities without and with it.
MEASURED = "WikiText-2 650 without BOS, 21 with it (2B); LAMBADA 6e9 and 3.5 (7B)"
SUCCESSOR = "LAMBADA 2645 without BOS (9B)"
LINEAGE = "trained like Gemma, with BOS at the start of every sequence"
NEEDS_BOS: Mapping[str, str] = {
    "gemma": MEASURED,
    "gemma2": SUCCESSOR,
    "gemma3": LINEAGE,
    "gemma3_text": LINEAGE,
    "gemma3n": LINEAGE,
    "gemma3n_text": LINEAGE,
    "gemma4": LINEAGE,
    "gemma4_text": LINEAGE,
    "gemma4_unified": LINEAGE,
    "gemma4_unified_text": LINEAGE,
    "recurrent_gemma": LINEAGE,
    "vaultgemma": LINEAGE,
}
CONTIGUOUS = "contiguous windows"
WITH_BOS = "windows that begin with BOS"


@dataclass(frozen=True)
class Bos:
    """What is known about BOS for the windows of one model.

    Parameters
    ----------
    token
        Id of BOS, or None if the tokenizer has none.
    mode
        The mode, resolved: ``"always"`` or ``"never"``, and ``"auto"`` only for a family
        that needs BOS.
    family
        Type of the model, for messages.
    """

    token: int | None = None
    mode: BosMode = "never"
    family: str = ""

    @classmethod
    def of(cls, mode: str, family: str, tokenizer: Any = None, config: Any = None) -> Bos:
        """Resolve a mode for a model.

        Parameters
        ----------
        mode
            ``"auto"``, ``"always"`` or ``"never"``.
        family
            Type of the model in its configuration.
        tokenizer
            Its tokenizer; None for token ids, whose BOS is that of the configuration.
        config
            Configuration of the model.

        Raises
        ------
        UsageError
            The mode is unknown, or BOS is required and there is none.
        """
        check_bos(mode)
        if mode == "never" or (mode == "auto" and family not in NEEDS_BOS):
            return cls(family=family)
        known = tokenizer if tokenizer is not None else _text_config(config)
        token = getattr(known, "bos_token_id", None)
        token = token if isinstance(token, int) else None
        if token is None and mode == "always":
            message = (
                "bos is always, but the tokenizer has no BOS token: choose never, or give "
                "the tokenizer a bos_token"
            )
            raise UsageError(message)
        return cls(token, mode, family)  # type: ignore[arg-type]  # checked above

    @property
    def of_drawn(self) -> int | None:
        """Token in front of windows that are cut from a text or a stream of ids."""
        return self.token

    @property
    def of_given(self) -> int | None:
        """Token in front of windows that the user has cut."""
        return self.token if self.mode == "always" else None

    def notes(self, first: list[int], *, put: bool) -> list[str]:
        """Remarks for the log, about windows with these first tokens."""
        needed = f"{self.family} needs it" if self.family in NEEDS_BOS else "bos is always"
        if put:
            return [f"every window begins with BOS (token {self.token}): {needed}"]
        if self.mode != "auto":
            return []
        if self.token is None:
            return [f"{self.family} needs BOS, but its tokenizer has none: none was put"]
        if all(token == self.token for token in first):
            return []
        return [
            f"{self.family} needs BOS (token {self.token}), which the given windows do not "
            f"begin with: put it there, or choose bos always"
        ]


def check_bos(mode: str) -> None:
    """Refuse an unknown mode with a UsageError."""
    if mode not in BOS_MODES:
        message = f"bos is one of {', '.join(BOS_MODES)}, got {mode!r}"
        raise UsageError(message)


def _text_config(config: Any) -> Any:
    """Configuration of the text part of a model."""
    return config if config is None else config.get_text_config(decoder=True)

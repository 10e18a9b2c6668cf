"""Hidden states between two blocks: in memory, or in files mapped into memory.

A file is unlinked as soon as it is mapped: its space is freed with its last tensor, and a
killed run leaves no file. The system writes mapped pages to the disk when it needs the
memory.
"""

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from layerwise.errors import DataError, UsageError
from layerwise.run.capacity import HIDDEN_SHARE, free_memory

Activations = Literal["auto", "memory", "disk"]


class HiddenStore:
    """Store for batches of hidden states.

    Parameters
    ----------
    folder
        Folder of the files; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._count = 0

    def keep(self, batches: Iterable[Tensor]) -> Sequence[Tensor]:
        """Store batches one by one; return them as a sequence that can be reread."""
        if self._folder is None:
            return list(batches)
        return [self._map(batch.detach()) for batch in batches]

    def _map(self, batch: Tensor) -> Tensor:
        assert self._folder is not None
        self._count += 1
        draw = secrets.token_hex(4)  # ranks on other machines may have the same number
        path = self._folder / f".hidden-{os.getpid()}-{self._count}-{draw}.tmp"
        try:
            with path.open("wb") as stream:  # reserve all of its space, or fail now
                os.posix_fallocate(stream.fileno(), 0, max(batch.nbytes, 1))
            mapped = torch.from_file(
                str(path), shared=True, size=batch.numel(), dtype=batch.dtype
            )
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            message = (
                f"cannot keep hidden states in {self._folder} ({batch.nbytes} bytes "
                f"needed): {reason}; free space there, or give --activations memory"
            )
            raise DataError(message) from error
        finally:
            path.unlink(missing_ok=True)
        return mapped.view(batch.shape).copy_(batch)


def choose_store(
    activations: str, folder: Path | None, needed: int, free: int | None
) -> HiddenStore:
    """Choose the store of a run.

    Parameters
    ----------
    activations
        ``"memory"``, ``"disk"``, or ``"auto"``: the disk if memory is short.
    folder
        Partial folder of the run; None keeps everything in memory.
    needed, free
        Bytes of all hidden states that exist at one time, and of free memory if known.

    Raises
    ------
    UsageError
        The value is none of the three, or the disk is requested without a folder.
    """
    check_activations(activations)
    if activations == "disk" and folder is None:
        message = "activations on disk need an output folder: give output_dir as well"
        raise UsageError(message)
    return HiddenStore(folder if goes_to_disk(activations, needed, free) else None)


def goes_to_disk(activations: str, needed: int, free: int | None) -> bool:
    """Whether hidden states are files, in a run that has a folder for them.

    Parameters
    ----------
    activations, needed, free
        As for :func:`choose_store`.
    """
    short = free is not None and needed * HIDDEN_SHARE > free
    wanted = activations == "disk" or (activations == "auto" and short)
    return wanted and hasattr(os, "posix_fallocate")


def n_streams(error_correction: str) -> int:
    """Number of streams of hidden states: one, or one dense and one pruned."""
    return 2 if error_correction == "full" else 1


def n_sets(error_correction: str) -> int:
    """Number of sets of hidden states at one time: before and after a block, per stream."""
    return 2 * n_streams(error_correction)


def hidden_bytes(error_correction: str, tokens: int, width: int, itemsize: int) -> int:
    """Bytes of all hidden states that exist at one time.

    Parameters
    ----------
    error_correction
        Mode of the run.
    tokens
        Number of calibration tokens.
    width, itemsize
        Channels between the blocks, and bytes of an activation.
    """
    return n_sets(error_correction) * tokens * width * itemsize


def check_activations(activations: str) -> None:
    """Refuse an unknown value of `activations`."""
    if activations not in get_args(Activations):
        known = ", ".join(get_args(Activations))
        message = f"activations is one of {known}, got {activations!r}"
        raise UsageError(message)


def hidden_store(
    activations: str, folder: Path | None, model: Any, n_tokens: int, error_correction: str
) -> HiddenStore:
    """Choose the store for the hidden states of all tokens before and after a block."""
    embedding = model.get_input_embeddings().weight
    width, size = embedding.shape[1], embedding.element_size()
    needed = hidden_bytes(error_correction, n_tokens, width, size)
    return choose_store(activations, folder, needed, free_memory())

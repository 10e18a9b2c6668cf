"""Hidden states between two blocks: in memory, or in files that are mapped into it.

A mapped file loses its name at once: its space is free again when the last tensor in it
is, and nothing is left of a run that is killed. The system writes mapped pages to the disk
when it needs the memory.
"""

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from layerwise.errors import DataError, UsageError

Activations = Literal["auto", "memory", "disk"]
LARGEST_SHARE = 4  # of what is free, its inverse: more than that goes to the disk


class HiddenStore:
    """Keeps batches of hidden states.

    Parameters
    ----------
    folder
        Where files are made; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._count = 0

    def keep(self, batches: Iterable[Tensor]) -> Sequence[Tensor]:
        """Batches one by one, as a sequence that can be read again and again."""
        if self._folder is None:
            return list(batches)
        return [self._map(batch.detach()) for batch in batches]

    def _map(self, batch: Tensor) -> Tensor:
        assert self._folder is not None
        self._count += 1
        draw = secrets.token_hex(4)  # ranks on other machines may have the same number
        path = self._folder / f".hidden-{os.getpid()}-{self._count}-{draw}.tmp"
        try:
            with path.open("wb") as stream:  # all of its space, or an error now
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
    asked: str, folder: Path | None, needed: int, free: int | None
) -> HiddenStore:
    """Store of a run.

    Parameters
    ----------
    asked
        ``"memory"``, ``"disk"``, or ``"auto"``: the disk where the memory is short.
    folder
        Partial folder of the run; without one everything stays in memory.
    needed, free
        Bytes of all hidden states that live at a time, and of free memory if known.

    Raises
    ------
    UsageError
        The word is none of the three, or there is no folder for the disk.
    """
    check_activations(asked)
    if asked == "disk" and folder is None:
        message = "activations on disk need an output folder: give output_dir as well"
        raise UsageError(message)
    return HiddenStore(folder if goes_to_disk(asked, needed, free) else None)


def goes_to_disk(asked: str, needed: int, free: int | None) -> bool:
    """Whether hidden states are files in a run that has a folder for them.

    Parameters
    ----------
    asked, needed, free
        As for :func:`choose_store`.
    """
    short = free is not None and needed * LARGEST_SHARE > free
    wanted = asked == "disk" or (asked == "auto" and short)
    return wanted and hasattr(os, "posix_fallocate")


def n_streams(error_correction: str) -> int:
    """Streams of hidden states between the blocks: of the dense and the pruned model."""
    return 2 if error_correction == "full" else 1


def n_sets(error_correction: str) -> int:
    """Sets of hidden states that live at a time: before and after a block, per stream."""
    return 2 * n_streams(error_correction)


def hidden_bytes(error_correction: str, tokens: int, width: int, itemsize: int) -> int:
    """Bytes of all hidden states that live at a time.

    Parameters
    ----------
    error_correction
        Mode of the run.
    tokens
        Of the calibration set.
    width, itemsize
        Channels between the blocks, and bytes of an activation.
    """
    return n_sets(error_correction) * tokens * width * itemsize


def check_activations(asked: str) -> None:
    """Refuse an unknown place."""
    if asked not in get_args(Activations):
        message = f"activations is one of {', '.join(get_args(Activations))}, got {asked!r}"
        raise UsageError(message)


def hidden_store(
    asked: str, folder: Path | None, model: Any, n_tokens: int, error_correction: str
) -> HiddenStore:
    """Store for the hidden states of all tokens before and after a block."""
    embedding = model.get_input_embeddings().weight
    width, size = embedding.shape[1], embedding.element_size()
    needed = hidden_bytes(error_correction, n_tokens, width, size)
    return choose_store(asked, folder, needed, free_memory())


def free_memory() -> int | None:
    """Bytes of memory that a new allocation can get without swapping, if known."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None

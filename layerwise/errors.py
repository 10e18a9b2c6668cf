"""The exceptions of the toolkit, each with its exit code on the command line.

Misuse raises an exception; the outcome of an optimisation is a
:class:`~layerwise.solution.Status`. Every message is one line that says what is wrong,
where (layer, tensor, index), and what to change.
"""

import reprlib
from typing import Any, ClassVar

LONGEST_MESSAGE = 1000  # characters; what is quoted may be of any length
LONGEST_QUOTE = 80


class LayerwiseError(Exception):
    """Base class: ``except LayerwiseError`` catches everything raised on purpose."""

    exit_code: ClassVar[int] = 2

    def __str__(self) -> str:
        """Message; the middle of a very long one is left out."""
        return shortened(super().__str__(), LONGEST_MESSAGE)


class UsageError(LayerwiseError, ValueError):
    """An argument is impossible or contradicts another one."""


class InvalidProblemError(LayerwiseError, ValueError):
    """The data of a layer problem cannot be used: wrong shape, NaN, impossible pattern."""


class UnsupportedModelError(LayerwiseError, TypeError):
    """No adapter knows this architecture, or nothing in it can be pruned."""


class VerificationError(LayerwiseError):
    """A finished folder or a solution is not as it claims to be."""

    exit_code: ClassVar[int] = 3


class SolveError(LayerwiseError, RuntimeError):
    """A layer could not be solved; the message names it and what to change."""

    exit_code: ClassVar[int] = 4


class MemoryBudgetError(LayerwiseError, MemoryError):
    """The memory budget is too small for the smallest possible chunk of work."""

    exit_code: ClassVar[int] = 5


class DataError(LayerwiseError):
    """Calibration text, a dataset or a checkpoint is missing, damaged or hostile."""

    exit_code: ClassVar[int] = 6


class WorkerError(LayerwiseError, RuntimeError):
    """Workers or ranks are lost or cannot start; finished work is kept."""

    exit_code: ClassVar[int] = 7


class Interrupted(LayerwiseError):
    """The run was stopped; finished work is kept and the run can be resumed."""

    exit_code: ClassVar[int] = 75


def shortened(text: str, length: int) -> str:
    """Text of at most ``length`` characters, without its middle if it is longer."""
    half = (length - 5) // 2
    return text if len(text) <= length else f"{text[:half]} ... {text[-half:]}"


def quoted(value: Any, length: int = LONGEST_QUOTE) -> str:
    """Representation of any value for an error: short, and made in a short time."""
    try:
        text = repr(value[:length]) if isinstance(value, str) else reprlib.repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a huge {type(value).__name__}"
    return shortened(text, length)


def one_line(error: BaseException, length: int = 300) -> str:
    """First ``length`` characters of an error's message, without line breaks."""
    return " ".join(str(error).split())[:length] or type(error).__name__

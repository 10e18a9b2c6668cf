"""The exceptions of the toolkit, each with its exit code on the command line.

Misuse raises an exception; the outcome of an optimisation is a
:class:`~layerwise.solution.Status`. Every message is one line that says what is wrong,
where (layer, tensor, index), and what to change.
"""

from typing import ClassVar


class LayerwiseError(Exception):
    """Base class: ``except LayerwiseError`` catches everything raised on purpose."""

    exit_code: ClassVar[int] = 2


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


def one_line(error: BaseException, length: int = 300) -> str:
    """First ``length`` characters of an error's message, without line breaks."""
    return " ".join(str(error).split())[:length] or type(error).__name__

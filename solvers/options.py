"""Checks of hyper-parameters."""

from collections.abc import Collection
from numbers import Real

from layerwise.errors import UsageError


def check_at_least(solver: object, **least: float) -> None:
    """Raise :class:`UsageError` unless every named option is at least its bound.

    Parameters
    ----------
    solver
        Object whose attributes are the options.
    **least
        Smallest value of each option; NaN fails every check.
    """
    for name, bound in least.items():
        value = getattr(solver, name)
        if not _is_number(value) or not value >= bound:
            message = f"{name} must be at least {bound}, got {value!r}"
            raise UsageError(message)


def check_finite(solver: object, *names: str) -> None:
    """Raise :class:`UsageError` unless every named option is finite and not negative."""
    for name in names:
        value = getattr(solver, name)
        if not _is_number(value) or not 0 <= value < float("inf"):
            message = f"{name} must be a number >= 0, got {value!r}"
            raise UsageError(message)


def check_one_of(solver: object, name: str, *choices: str) -> None:
    """Raise :class:`UsageError` unless the named option is one of the choices."""
    check_word(name, getattr(solver, name), choices)


def check_word(name: str, value: str, choices: Collection[str]) -> None:
    """Raise :class:`UsageError` unless an option is one of the choices."""
    if value not in choices:
        message = f"{name} is one of {', '.join(choices)}, got {value!r}"
        raise UsageError(message)


def check_positive(solver: object, *names: str) -> None:
    """Raise :class:`UsageError` unless every named option is a number above zero."""
    for name in names:
        value = getattr(solver, name)
        if not _is_number(value) or not 0 < value < float("inf"):
            message = f"{name} must be a number above 0, got {value!r}"
            raise UsageError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)

"""Largest numbers that an argument can have: beyond them something must be a slip.

Each is far above what any use needs, and low enough that nothing is allocated for it.
"""

from layerwise.errors import UsageError, quoted

MOST_WORKERS = 1024
MOST_THREADS = 1024  # of one process
LARGEST_GROUP = 4096  # m of n:m
LARGEST_WIDTH = 1 << 18  # of a random matrix
LARGEST_NUMBER = 1 << 53  # of anything that is counted, bytes included


def check_limit(name: str, value: int, most: int = LARGEST_NUMBER) -> None:
    """Refuse a number above its limit."""
    if value > most:
        message = f"{name} is {quoted(value)}: the largest that is allowed is {most}"
        raise UsageError(message)

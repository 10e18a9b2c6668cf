"""Return freed memory to the system.

The C library keeps freed memory for later. Memory of grams of one width cannot be reused
for those of the next, and that of an encoded text is in small pieces, so a run would hold
several hundred unused megabytes.
"""

import ctypes
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

GRAM_ITEM = 8  # bytes of a float64
WORTH = 4 << 20  # bytes of a gram; getting the pages of smaller ones again takes longer


def trim_memory(width: int | None = None) -> None:
    """Return free memory of the C heap if the C library supports it; takes milliseconds.

    Parameters
    ----------
    width
        Width of the current grams; nothing is done if they are small.
    """
    small = width is not None and GRAM_ITEM * width**2 < WORTH
    if not small and (trim := _malloc_trim()) is not None:
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], Any] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        trim: Callable[[int], Any] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return None
    return trim

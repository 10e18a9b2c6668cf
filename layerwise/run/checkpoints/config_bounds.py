"""Limits of the numbers in ``config.json``, which may be damaged or hostile.

transformers makes a list of labels and of kinds of layers, and modules for layers and
experts, as soon as it reads their numbers. So a file of a few hundred bytes could take all
memory before any tensor is compared with it. Sizes of tensors need no limit: a model is
first built without memory.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import DataError

MOST_ENTRIES = 1 << 17  # of lists, such as names of labels
MOST_MODULES = 1 << 14
MODULES = re.compile(r"layer|expert|block")
COUNTS = re.compile(r"^(num|n)_|_(num|labels|codebooks|heads|groups)$")
# numbers that begin with num_ or n_ but take no memory of their own
FREE = re.compile(r"token|param|position|ctx|embd|inner|step|samples|vocab|size|dim")
SHOWN = 40  # characters of a key or value in a message


def check_counts(config: dict[str, Any], where: Path) -> None:
    """Refuse a number of layers, experts, labels or the like that no model has."""
    for key, value in _walk(config):
        numbers = [value] if isinstance(value, int | float) else value
        if FREE.search(key) or not isinstance(numbers, list):
            continue
        most = MOST_MODULES if MODULES.search(key) else MOST_ENTRIES
        counted = COUNTS.search(key) or key.endswith(("layers", "experts", "blocks"))
        for number in numbers:
            if counted and isinstance(number, int | float) and number > most:
                message = (
                    f"{where} says {key[:SHOWN]} {str(number)[:SHOWN]}, which is more than "
                    f"{most}: correct the number, or download the file again"
                )
                raise DataError(message)


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of nested objects."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key, item
            yield from _walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from _walk(item)

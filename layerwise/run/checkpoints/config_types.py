"""The type of the parameters that ``config.json`` names.

Tools write ``dtype`` or, formerly, ``torch_dtype``. Some write ``"auto"``, which is an
argument of transformers and not the name of a type: such a key says nothing and is removed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import DataError
from layerwise.run.checkpoints.shard import FLOATS

KEYS = ("dtype", "torch_dtype")
NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS.values())
AUTO = "auto"


def check_types(config: dict[str, Any], where: Path) -> None:
    """Refuse a type of parameters that no model can have."""
    for part in _parts(config):
        for key in KEYS:
            if part.get(key) not in (None, AUTO, *NAMES):
                value = str(part[key])[:40]
                message = (
                    f"{where} says {key} {value!r}, which is not one of "
                    f"{', '.join(NAMES)}: correct it, or remove the key"
                )
                raise DataError(message)


def says_auto(config: dict[str, Any]) -> bool:
    """Whether a configuration has ``"auto"`` instead of a type."""
    return any(part.get(key) == AUTO for part in _parts(config) for key in KEYS)


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """Copy of a configuration without keys that say ``"auto"``."""
    return {
        key: without_auto(value) if _is_part(key, value) else value
        for key, value in config.items()
        if not (key in KEYS and value == AUTO)
    }


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration and those of its parts, such as ``text_config``."""
    yield config
    for key, value in config.items():
        if _is_part(key, value):
            yield from _parts(value)


def _is_part(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key.endswith("_config") and "quant" not in key

"""Keys of ``config.json`` that say nothing, but that transformers cannot read.

Tools write the type of the parameters as ``dtype`` or, formerly, ``torch_dtype``. Some
write ``"auto"``, which is an argument of transformers and not the name of a type. Others
write a ``quantization_config`` that describes zeros and no quantisation. Such keys are
left out when a configuration is read, and in a copy.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, UnsupportedModelError
from layerwise.run.checkpoints.shard import FLOATS

TYPES = ("dtype", "torch_dtype")
NAMES = tuple(str(dtype).removeprefix("torch.") for dtype in FLOATS.values())
AUTO = "auto"
QUANTISATION = "quantization_config"
SHOWN = 40  # characters of a value in a message


def check_types(config: dict[str, Any], where: Path) -> None:
    """Refuse a type of parameters that no model can have."""
    for part in _parts(config):
        for key in TYPES:
            if part.get(key) not in (None, AUTO, *NAMES):
                message = (
                    f"{where} says {key} {str(part[key])[:SHOWN]!r}, which is not one of "
                    f"{', '.join(NAMES)}: correct it, or remove the key"
                )
                raise DataError(message)


def refuse_quantised(config: dict[str, Any], folder: Path) -> None:
    """Refuse quantised or compressed weights; zeros alone are neither."""
    settings = config.get(QUANTISATION)
    if not settings:
        return
    if not _only_zeros(settings):
        message = f"{folder} is quantised: prune the original, then quantise the result"
        raise UnsupportedModelError(message)
    kind = settings["sparsity_config"].get("format", "dense")
    if kind != "dense":
        message = (
            f"{folder} stores its zeros compressed (format {str(kind)[:SHOWN]!r}): save "
            f"it without compression first"
        )
        raise UnsupportedModelError(message)


def is_plain(config: dict[str, Any]) -> bool:
    """Whether a configuration has no keys that are left out."""
    return plain(config) == config


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """Copy of a configuration without keys that say nothing."""
    return {
        key: plain(value) if _is_part(key, value) else value
        for key, value in config.items()
        if not (key in TYPES and value == AUTO)
        and not (key == QUANTISATION and (not value or _only_zeros(value)))
    }


def plain_bytes(config: dict[str, Any]) -> bytes:
    """Content of the file of a plain configuration."""
    return (json.dumps(plain(config), indent=2) + "\n").encode()


def _only_zeros(settings: Any) -> bool:
    """Whether settings of compressed-tensors describe sparsity and no quantisation."""
    if not isinstance(settings, dict) or settings.get("config_groups"):
        return False
    return isinstance(settings.get("sparsity_config"), dict) and "bits" not in settings


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration and those of its parts, such as ``text_config``."""
    yield config
    for key, value in config.items():
        if _is_part(key, value):
            yield from _parts(value)


def _is_part(key: str, value: Any) -> bool:
    return isinstance(value, dict) and key.endswith("_config") and key != QUANTISATION

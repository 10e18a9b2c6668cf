"""Model type that marks the native format; see :mod:`layerwise.run.models.native`."""

from collections.abc import Mapping
from typing import Any

MODEL_TYPE = "layerwise_native"


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a parsed ``config.json`` belongs to a native folder."""
    return config.get("model_type") == MODEL_TYPE

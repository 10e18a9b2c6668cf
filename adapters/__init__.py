"""The adapters, one architecture family per file.

``ADAPTERS`` maps ``config.model_type`` to a declaration, as ``"module:NAME"``, so that
listing the families imports none of them. Other decoders are served by
:func:`layerwise.adapters.auto.discover`, which runs the model and writes the declaration.
"""

import difflib
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from layerwise.adapters.base import Adapter, OutputSlice, Stage
from layerwise.errors import UnsupportedModelError

__all__ = ["ADAPTERS", "Adapter", "OutputSlice", "Stage", "get_adapter"]

ADAPTERS: Mapping[str, str] = MappingProxyType(
    {
        "opt": "layerwise.adapters.opt:OPT",
        "llama": "layerwise.adapters.llama:LLAMA",
        "mistral": "layerwise.adapters.llama:LLAMA",
        "qwen2": "layerwise.adapters.llama:LLAMA",
        "qwen3": "layerwise.adapters.llama:LLAMA",
        "mamba": "layerwise.adapters.mamba:MAMBA",
        "falcon_mamba": "layerwise.adapters.mamba:FALCON_MAMBA",
        "mamba2": "layerwise.adapters.mamba:MAMBA2",
    }
)


def get_adapter(model_type: str) -> Adapter:
    """Declared adapter of a model type; an unknown one is answered with the known ones."""
    if model_type not in ADAPTERS:
        close = difflib.get_close_matches(model_type, ADAPTERS, n=2)
        hint = f" (close: {', '.join(close)})" if close else ""
        known = ", ".join(ADAPTERS)
        message = f"no adapter for model type {model_type!r}{hint}; supported: {known}"
        raise UnsupportedModelError(message)
    module, _, name = ADAPTERS[model_type].partition(":")
    adapter = getattr(import_module(module), name)
    assert isinstance(adapter, Adapter)
    return adapter


if __name__ != "layerwise.adapters":  # a second copy of every class would follow
    _message = "import layerwise.adapters, not the folder it lies in"
    raise ImportError(_message)

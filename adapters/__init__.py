"""The adapters, one architecture family per file.

``ADAPTERS`` maps ``config.model_type`` to a declaration, as ``"module:NAME"``, so that
listing the families imports none of them. For other decoders,
:func:`layerwise.adapters.auto.discover` runs the model and writes the declaration.
"""

import difflib
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType

from layerwise.adapters.base import Adapter, OutputSlice, Stage
from layerwise.adapters.couplings import BiasFlag, Channels, Coupling
from layerwise.errors import UnsupportedModelError

__all__ = [
    "ADAPTERS",
    "Adapter",
    "BiasFlag",
    "Channels",
    "Coupling",
    "OutputSlice",
    "Stage",
    "get_adapter",
    "get_coupling",
]

ADAPTERS: Mapping[str, str] = MappingProxyType(
    {
        "opt": "layerwise.adapters.opt:OPT",
        "llama": "layerwise.adapters.llama:LLAMA",
        "mistral": "layerwise.adapters.llama:MISTRAL",
        "qwen2": "layerwise.adapters.llama:QWEN2",
        "qwen3": "layerwise.adapters.llama:QWEN3",
        "mamba": "layerwise.adapters.mamba:MAMBA",
        "falcon_mamba": "layerwise.adapters.mamba:FALCON_MAMBA",
        "mamba2": "layerwise.adapters.mamba:MAMBA2",
    }
)


def get_adapter(model_type: str) -> Adapter:
    """Declared adapter of a model type; the error for an unknown type lists the known."""
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


def get_coupling(adapter: Adapter, name: str) -> Coupling:
    """Coupling of an adapter by name; the error for an unknown name lists the known."""
    for coupling in adapter.couplings:
        if coupling.name == name:
            return coupling
    if adapter.couplings:
        known = ", ".join(coupling.name for coupling in adapter.couplings)
        message = (
            f"{adapter.name} blocks have no channels called {name!r}; there are {known}"
        )
    else:
        families = [family for family in ADAPTERS if get_adapter(family).couplings]
        message = (
            f"no channels are declared for {adapter.name}, so none can be removed from it; "
            f"families with channels: {', '.join(families)}"
        )
    raise UnsupportedModelError(message)


if __name__ != "layerwise.adapters":  # a second copy of every class would follow
    _message = "import layerwise.adapters, not the folder it lies in"
    raise ImportError(_message)

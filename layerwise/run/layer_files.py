"""Layers in safetensors files: a weight, and the moments of the inputs of its layer.

A file holds one layer as tensors ``weight`` and ``gram``, or several as ``NAME.weight``
and ``NAME.gram``:

- ``weight``: W, shape (out, in);
- ``gram``: ``Xhat Xhat^T / tokens``, shape (in, in);
- ``cross_gram``: ``X Xhat^T / tokens``, if the dense model sees other inputs; then
- ``energy``: row sums of ``(W X)^2 / tokens``, shape (out,), must be there too.

A folder is all its files, in the order of their names.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from layerwise.errors import DataError
from layerwise.moments import Moments
from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem
from layerwise.run.shard import read_header

FIELDS = ("weight", "gram", "cross_gram", "energy")
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A layer that can be posed as a problem.

    Parameters
    ----------
    name
        For tables.
    weight
        Dense weight, shape (out, in).
    moments
        Of its inputs.
    energy
        Row sums of ``(W X)^2 / tokens``, shape (out,); None if they follow from the gram.
    """

    name: str
    weight: Tensor
    moments: Moments
    energy: Tensor | None = None

    def problem(self, pattern: Pattern, damping: float = 0.01) -> LayerProblem:
        """Pose the layer with a pattern."""
        return LayerProblem.from_moments(
            self.weight,
            self.moments,
            pattern=pattern,
            energy=self.energy,
            damping=damping,
        )


def read_layers(path: Path) -> Iterator[StoredLayer]:
    """Layers of a file or a folder, one in memory at a time; all headers are read first.

    Raises
    ------
    DataError
        Nothing is there, a file is damaged, or it holds anything but complete layers.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        message = f"{path} holds no safetensors file: store layers as weight and gram"
        raise DataError(message)
    layers = [(file, name) for file in files for name in _names(file)]
    return (_read(file, name) for file, name in layers)


def _names(file: Path) -> list[str]:
    """Prefixes of the layers in a file, "" for the one without."""
    found: dict[str, set[str]] = {}
    for tensor, entry in read_header(file).tensors.items():
        name, _, field = tensor.rpartition(".")
        if field not in FIELDS or entry.dtype not in FLOATS:
            message = (
                f"{file} holds {tensor!r} of type {entry.dtype}: a layer is made of "
                f"{', '.join(FIELDS)}, floating point, with the name of the layer and a "
                "point before"
            )
            raise DataError(message)
        found.setdefault(name, set()).add(field)
    for name, fields in found.items():
        needed = {"weight", "gram"}
        if {"cross_gram", "energy"} & fields:
            needed = set(FIELDS)
        if missing := sorted(needed - fields):
            message = f"{file} has no {missing[0]} of layer {name or file.stem!r}: store it"
            raise DataError(message)
    if not found:
        message = f"{file} holds no layer: store weight and gram"
        raise DataError(message)
    return sorted(found)


def _read(file: Path, name: str) -> StoredLayer:
    prefix = f"{name}." if name else ""
    with safe_open(file, framework="pt") as stream:
        known = set(stream.keys())
        values = {
            field: stream.get_tensor(prefix + field)
            for field in FIELDS
            if prefix + field in known
        }
    moments = Moments(values["gram"], values.get("cross_gram"))
    return StoredLayer(name or file.stem, values["weight"], moments, values.get("energy"))

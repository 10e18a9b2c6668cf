"""Layers in safetensors files: their weights, and the moments of their inputs.

A file holds one layer as tensors ``weight`` and ``gram``, or several layers as
``NAME.weight`` and ``NAME.gram``:

- ``weight``: W, shape (out, in);
- ``gram``: ``Xhat Xhat^T / tokens``, shape (in, in);
- ``cross_gram``: ``X Xhat^T / tokens``, if the dense model has other inputs;
- ``energy``: row sums of ``(W X)^2 / tokens``, shape (out,), required with ``cross_gram``;
- ``input_mean``, ``pruned_input_mean``, ``fluctuation``: shape (in,), for methods that
  read them.

Layers that read the same inputs share their moments. Moments stored without ``NAME`` belong
to every layer of the file without moments of its own. So ``gram``, ``q.weight`` and
``k.weight`` are two layers that share one gram. The number of tokens, if known, is the
entry ``n_tokens`` of the metadata in the header.

The layers of a folder are those of all its files, in the order of the file names.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from layerwise.errors import DataError, InvalidProblemError
from layerwise.moments import VECTORS, Moments
from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.shard import FLOATS, Header, read_header
from layerwise.solve import steps_of
from layerwise.solver import Solver, requirements

MOMENTS = ("gram", "cross_gram", *VECTORS)  # layers can share these
FIELDS = ("weight", "energy", *MOMENTS)
N_TOKENS = "n_tokens"


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A stored layer, which can be posed as a problem.

    Parameters
    ----------
    name
        Name for tables.
    weight
        Dense weight, shape (out, in).
    moments
        Moments of the inputs.
    energy
        Row sums of ``(W X)^2 / tokens``, shape (out,); None if they follow from the gram.
    """

    name: str
    weight: Tensor
    moments: Moments
    energy: Tensor | None = None

    def problem(self, pattern: Pattern, damping: float = 0.01) -> LayerProblem:
        """Pose the problem of the layer with a pattern."""
        return LayerProblem.from_moments(
            self.weight,
            self.moments,
            pattern=pattern,
            energy=self.energy,
            damping=damping,
        )

    def on(self, device: torch.device) -> "StoredLayer":
        """Return the layer on a device; moments that had to be moved are not shared."""
        energy = None if self.energy is None else self.energy.to(device)
        moments = self.moments
        if moments.gram.device != device:
            moments = moments_on(moments, device)
        return replace(self, weight=self.weight.to(device), moments=moments, energy=energy)


def moments_on(moments: Moments, device: torch.device) -> Moments:
    """Return the moments on a device, without cached results."""

    def moved(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    return replace(
        moments,
        gram=moments.gram.to(device),
        cross_gram=moved(moments.cross_gram),
        input_mean=moved(moments.input_mean),
        pruned_input_mean=moved(moments.pruned_input_mean),
        fluctuation=moved(moments.fluctuation),
    )


def missing_statistic(solver: Solver, moments: Moments) -> str | None:
    """Name a step and the statistic it lacks in stored moments; None if it lacks none."""
    for step in steps_of(solver):
        needed = requirements(step)
        lacking = {
            "mean": moments.input_mean is None,
            "fluctuation": moments.fluctuation is None,
            "gradient": True,  # of the loss: never part of the moments
        }
        for statistic, absent in lacking.items():
            if absent and statistic in needed:
                return f"{step.name} needs the {statistic} of the inputs"
    return None


def read_layers(path: str | Path) -> Iterator[StoredLayer]:
    """Read the layers of a file or a folder, one file at a time; headers are checked first.

    Raises
    ------
    DataError
        There is no file, or a file is damaged or does not hold complete layers only.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        message = f"{path} holds no safetensors file: store layers as weight and gram"
        raise DataError(message)
    for file in files:
        if file.suffix != ".safetensors":
            message = (
                f"{file} is not a safetensors file: save weight and gram with "
                f"safetensors.torch.save_file"
            )
            raise DataError(message)
        layer_tensors(file, read_header(file))
    return (layer for file in files for layer in read_file(file))


def read_file(file: Path) -> Iterator[StoredLayer]:
    """Read the layers of one file, in the order of their names; shared moments are shared.

    Raises
    ------
    DataError
        The file is damaged, does not hold complete layers only, or holds impossible moments
        (NaN, not symmetric, indefinite).
    """
    header = read_header(file)
    layers = layer_tensors(file, header)
    n_tokens = _n_tokens(file, header)
    made: dict[tuple[str, ...], Moments] = {}
    for name, tensors in layers.items():
        key = tuple(tensors.get(field, "") for field in MOMENTS)
        try:
            with safe_open(file, framework="pt") as stream:
                if key not in made:
                    known = {
                        field: stream.get_tensor(tensors[field])
                        for field in MOMENTS
                        if field in tensors
                    }
                    made[key] = Moments(**known, n_tokens=n_tokens)
                    made[key].check_definite()
                own = [tensors[f] for f in ("weight", "energy") if f in tensors]
                weight, *energy = (stream.get_tensor(tensor) for tensor in own)
        except (InvalidProblemError, SafetensorError, OSError) as error:
            message = f"{file}: {error}; store the layer again"
            raise DataError(message) from error
        yield StoredLayer(name, weight, made[key], energy[0] if energy else None)


def layer_tensors(file: Path, header: Header) -> dict[str, dict[str, str]]:
    """Tensors of every layer of a file: name of the layer -> field -> name of the tensor.

    Raises
    ------
    DataError
        The file does not hold complete layers only.
    """
    fields_of: dict[str, set[str]] = {}
    for tensor, entry in header.tensors.items():
        name, _, field = tensor.rpartition(".")
        if field not in FIELDS or entry.dtype not in FLOATS:
            message = (
                f"{file} holds {tensor!r} of type {entry.dtype}: tensors of layers must be "
                f"floating point and named FIELD or NAME.FIELD, with FIELD one of "
                f"{', '.join(FIELDS)}"
            )
            raise DataError(message)
        fields_of.setdefault(name, set()).add(field)
    if not fields_of:
        message = f"{file} holds no layers: store weight and gram"
        raise DataError(message)
    shared = {field: field for field in fields_of.get("", ()) if field in MOMENTS}
    if len(fields_of) > 1 and "weight" not in fields_of.get("", set()):
        fields_of.pop("", None)  # not a layer: moments that the others share
    layers = {}
    for name, fields in sorted(fields_of.items()):
        prefix = f"{name}." if name else ""
        tensors = shared | {field: prefix + field for field in fields}
        _check_complete(file, name or file.stem, tensors)
        layers[name or file.stem] = tensors
    return layers


def _check_complete(file: Path, name: str, tensors: Mapping[str, str]) -> None:
    needed = {"weight", "gram"}
    if {"cross_gram", "energy"} & set(tensors):
        needed |= {"cross_gram", "energy"}
    if missing := sorted(needed - set(tensors)):
        message = f"{file} has no {missing[0]} of layer {name!r}: store it"
        raise DataError(message)


def _n_tokens(file: Path, header: Header) -> int:
    text = header.metadata.get(N_TOKENS, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        message = f"{file} has n_tokens {text[:20]!r} in its metadata: store a number"
        raise DataError(message)
    return int(text)


def write_file(file: Path, moments: Moments, weights: Mapping[str, Tensor]) -> None:
    """Write layers that share their moments to one file, atomically.

    Parameters
    ----------
    file
        The file; its folder must exist.
    moments
        Moments of the shared inputs, stored in float64.
    weights
        Dense weights (out, in) by the name of the layer, stored in their own type.
    """
    tensors = {field: getattr(moments, field) for field in MOMENTS}
    tensors |= {f"{name}.weight": weight for name, weight in weights.items()}
    ready = {n: t.detach().cpu().contiguous() for n, t in tensors.items() if t is not None}
    metadata = {N_TOKENS: str(moments.n_tokens)}
    atomic_write(file, save(ready, metadata=metadata))

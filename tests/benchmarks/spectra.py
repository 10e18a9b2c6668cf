"""Grams of any width with the spectrum and the scales of a captured layer.

Eigenvalues of the captured gram of unit diagonal are read as a function of their rank
over the width, interpolated on a log-log scale (below the first rank its slope goes on),
and put on a random orthogonal basis; the diagonal follows the captured one.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from layerwise.gram import mirror_
from tests.benchmarks.captured import layers_of_model

STEEP = "opt/model.decoder.layers.1.self_attn.out_proj"
FLAT = "llama/model.layers.1.mlp.down_proj"
MIDDLE = "llama/model.layers.1.self_attn.o_proj"


@cache
def spectrum_of(layer: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the gram of unit diagonal, descending, and its diagonal, ascending."""
    folder = Path(tempfile.gettempdir()) / "layerwise-captured"
    model = layer.partition("/")[0]
    (found,) = [one for one in layers_of_model(folder, model) if one.name == layer]
    gram = found.moments.gram
    live = gram.diagonal() > 0  # some inputs of fc2 are zero in every token
    gram = gram[live][:, live]
    diagonal = gram.diagonal()
    unit = gram / diagonal.sqrt() / diagonal.sqrt()[:, None]
    values = torch.linalg.eigvalsh(unit).flip(0).clamp(min=1e-9)
    return values, (diagonal / diagonal.mean()).sort().values


def realistic_gram(
    width: int, layer: str = STEEP, seed: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Gram of a given width, shape (width, width), float64, like that of a layer.

    Cost: a QR of a (width, width) matrix. Random numbers are those of the device.
    """
    values, scales = spectrum_of(layer)
    known = np.log((np.arange(len(values)) + 0.5) / len(values))
    asked = np.log((np.arange(width) + 0.5) / width)
    logs = np.log(values.numpy())
    slope = (logs[4] - logs[0]) / (known[4] - known[0])
    wanted = np.interp(asked, known, logs)
    wanted += np.where(asked < known[0], slope * (asked - known[0]), 0)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (width, width)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
    basis = torch.linalg.qr(noise)[0]
    eigenvalues = torch.from_numpy(np.exp(wanted)).to(device)
    gram = (basis * (eigenvalues / eigenvalues.mean())) @ basis.T
    places = np.linspace(0, 1, width)
    sizes = np.interp(places, np.linspace(0, 1, len(scales)), scales.numpy())
    order = torch.randperm(width, generator=generator, device=device)
    root = torch.from_numpy(sizes).to(device)[order].sqrt() / gram.diagonal().sqrt()
    return mirror_(root[:, None] * gram * root)

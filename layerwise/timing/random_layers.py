"""Random layers of given sizes: weights, and grams with power-law eigenvalues.

The gram is ``S Q diag(1, 1/2, 1/3, ...) Q^T S`` with a random orthogonal Q and log-normal
channel scales S. Its trace is the width. Real layers differ: to race on one, store it and
give the file.
"""

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from layerwise.adapters.linear import matrix
from layerwise.errors import UsageError, quoted
from layerwise.gram import mirror_
from layerwise.grams.layer_files import StoredLayer
from layerwise.limits import LARGEST_WIDTH, check_limit
from layerwise.moments import Moments
from layerwise.run.models.architecture import adapter_of
from layerwise.timing.shapes import SHAPES

SPREAD = 0.5  # standard deviation of the logarithms of the scales


def layers_of_sizes(text: str, device: torch.device, seed: int) -> Iterator[StoredLayer]:
    """Layers from sizes such as ``2048x2048,1024x4096``: outputs times inputs."""
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d{0,8})x([1-9]\d{0,8})\s*", part)
        if match is None:
            message = (
                f"layers must be sizes such as 2048x2048,1024x4096, got {quoted(part)}"
            )
            raise UsageError(message)
        rows, width = int(match[1]), int(match[2])
        check_limit("the size of a layer", max(rows, width), LARGEST_WIDTH)
        sizes.append((rows, width))
    return (
        StoredLayer(
            f"{rows}x{width}",
            random_weight(rows, width, device, seed + index),
            Moments(random_gram(width, device, seed + index)),
        )
        for index, (rows, width) in enumerate(sizes)
    )


def layers_of_shape(shape: str, device: torch.device, seed: int) -> Iterator[StoredLayer]:
    """Matrices of one block of a shape in :data:`layerwise.timing.shapes.SHAPES`.

    Matrices that read the same inputs share their gram.
    """
    if shape not in SHAPES:
        message = f"unknown shape {shape!r}; known: {', '.join(SHAPES)}"
        raise UsageError(message)
    stages = _stages(shape)
    return _of_stages(stages, device, seed)


def _stages(shape: str) -> list[list[tuple[str, int, int]]]:
    """Name, outputs and inputs of every matrix of a block, grouped by stage."""
    from transformers import AutoModelForCausalLM

    config = SHAPES[shape]()
    config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 1})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapter = adapter_of(model)
    ((name, block),) = adapter.blocks_of(model).items()
    sizes = []
    for stage in adapter.stages_of(name):
        shapes = {n: matrix(adapter.linear(block, n)).shape for n in stage.linears}
        sizes.append([(n, shape[0], shape[1]) for n, shape in shapes.items()])
    return sizes


def _of_stages(
    stages: list[list[tuple[str, int, int]]], device: torch.device, seed: int
) -> Iterator[StoredLayer]:
    for stage in stages:
        gram = random_gram(stage[0][2], device, seed)
        for name, rows, width in stage:
            weight = random_weight(rows, width, device, seed)
            yield StoredLayer(name, weight, Moments(gram))
            seed += 1


def random_weight(rows: int, width: int, device: torch.device, seed: int) -> Tensor:
    """Weight of independent normal numbers, float32, shape (rows, width)."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator, device=device)
    return weight.div_(width**0.5)


def random_gram(width: int, device: torch.device, seed: int) -> Tensor:
    """Gram as described above, float64. Cost: a QR of a (width, width) matrix."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

    basis = torch.linalg.qr(normal(width, width))[0]
    values = 1 / torch.arange(1, width + 1, dtype=torch.float64, device=device)
    gram: Tensor = (basis * values) @ basis.T
    scales = (SPREAD * normal(width)).exp()
    gram = scales[:, None] * gram * scales
    trace = float(gram.diagonal().sum())
    return mirror_(gram * (width / trace))

"""Twelve layer problems of the packaged models, with held-out moments of the same layers.

Four matrices each from one block of OPT and LLaMA, the second by default, and in and out
projections of that block of Mamba and of the next. Both models of a problem are the dense
one (X = Xhat). The moments behind the problems come from the calibration text, the held-out
moments from the evaluation text, which no model was trained on: weights can be judged on
tokens that their solver never saw. ``python -m tests.benchmarks.captured FOLDER`` fills the
cache.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.demo import MODELS, calibration_text, evaluation_text, model_path
from layerwise.experiments.sources import code_identity
from layerwise.moments import Moments
from layerwise.patterns import Pattern
from layerwise.problem import LayerProblem
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.calibration import token_windows
from layerwise.run.data.tokens import encode
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import load_model

BATCH = 8
LENGTH = 256  # tokens per window
N_SEQUENCES = 64  # calibration windows, as in the demonstration
HELD_OUT_SEQUENCES = 64

BLOCK = 1  # counted from 0
BLOCKS = range(3)  # the models have four, and of Mamba the next is taken too

PREFIXES: Mapping[str, str] = MappingProxyType(
    {"opt": "model.decoder.layers", "llama": "model.layers", "mamba": "backbone.layers"}
)
LINEARS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "opt": ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"),
        "llama": ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
        "mamba": ("mixer.in_proj", "mixer.out_proj"),
    }
)


def layers_of(model: str, block: int = BLOCK) -> tuple[str, ...]:
    """Four layers of a packaged model; Mamba has two in a block, so two of the next."""
    blocks = (block, block + 1) if model == "mamba" else (block,)
    return tuple(
        f"{PREFIXES[model]}.{index}.{name}" for index in blocks for name in LINEARS[model]
    )


@dataclass(frozen=True, eq=False)
class CapturedLayer:
    """A layer of a packaged model.

    Parameters
    ----------
    name
        Model and module, as in ``llama/model.layers.2.mlp.up_proj``.
    weight
        Dense weight, shape (out, in), float32.
    moments
        Of the inputs on calibration text.
    held_out_moments
        Of the inputs on text that no model was trained on.
    """

    name: str
    weight: Tensor
    moments: Moments
    held_out_moments: Moments

    def problem(self, pattern: Pattern, damping: float = 0.01) -> LayerProblem:
        """Layer problem on the calibration tokens."""
        return LayerProblem.from_moments(
            self.weight, self.moments, pattern=pattern, damping=damping
        )

    def held_out(self, pattern: Pattern, damping: float = 0.01) -> LayerProblem:
        """The same problem on the held-out tokens: what weights are judged on."""
        return LayerProblem.from_moments(
            self.weight, self.held_out_moments, pattern=pattern, damping=damping
        )


def captured_layers(
    folder: Path, n_sequences: int = N_SEQUENCES, block: int = BLOCK
) -> list[CapturedLayer]:
    """Twelve layers, from the cache in a folder if it fits, else captured and cached.

    Parameters
    ----------
    folder
        Where one file per model, block and number of windows is kept.
    n_sequences
        Calibration windows of 256 tokens; a smaller number takes the first of them.
    block
        Block of the layers, counted from 0; of Mamba the next block serves too.
    """
    return [
        layer
        for model in MODELS
        for layer in layers_of_model(folder, model, n_sequences, block)
    ]


def layers_of_model(
    folder: Path, model: str, n_sequences: int = N_SEQUENCES, block: int = BLOCK
) -> Iterator[CapturedLayer]:
    """Those of :func:`captured_layers` that belong to one model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"captured-{model}-block{block}-{n_sequences}.safetensors"
    wanted = identity(model, n_sequences, block)
    if not _fits(path, wanted):
        atomic_write(path, save(_capture(model, n_sequences, block), {"identity": wanted}))
    with safe_open(path, framework="pt") as file:
        for layer in layers_of(model, block):
            yield CapturedLayer(
                f"{model}/{layer}",
                file.get_tensor(f"{layer}.weight"),
                _read_moments(file, f"{layer}.calibration"),
                _read_moments(file, f"{layer}.held_out"),
            )


def identity(model: str, n_sequences: int, block: int = BLOCK) -> str:
    """Everything that decides what is captured, as one hash."""
    parts = {
        "model": Checkpoint.open(model_path(model)).sha256(),
        "layers": layers_of(model, block),
        "windows": (n_sequences, HELD_OUT_SEQUENCES, LENGTH),
        **code_identity(None, ["layerwise.accumulator", "layerwise.run.data.calibration"]),
        "texts": [
            hashlib.sha256(text.encode()).hexdigest()
            for text in (calibration_text(), evaluation_text())
        ],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _fits(path: Path, wanted: str) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    return metadata.get("identity") == wanted


def _capture(name: str, n_sequences: int, block: int) -> dict[str, Tensor]:
    layers = layers_of(name, block)
    checkpoint = Checkpoint.open(model_path(name))
    model: Any = load_model(checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    calibration = token_windows(
        [calibration_text()], tokenizer, n_sequences=n_sequences, sequence_length=LENGTH
    )
    held_out = encode(evaluation_text(), tokenizer)[: HELD_OUT_SEQUENCES * LENGTH]
    tensors = {}
    for layer in layers:
        weight = model.get_submodule(layer).weight
        tensors[f"{layer}.weight"] = weight.detach().float()
    for kind, windows in (
        ("calibration", calibration.tokens),
        ("held_out", held_out.reshape(-1, LENGTH)),
    ):
        for layer, moments in _moments(model, layers, windows).items():
            assert moments.input_mean is not None
            tensors[f"{layer}.{kind}.gram"] = moments.gram
            tensors[f"{layer}.{kind}.mean"] = moments.input_mean
            tensors[f"{layer}.{kind}.n_tokens"] = torch.tensor(moments.n_tokens)
    return tensors


def _moments(model: Any, layers: tuple[str, ...], windows: Tensor) -> dict[str, Moments]:
    """Moments of the inputs of some layers over token windows, shape (windows, length)."""
    sums = {
        name: MomentAccumulator(model.get_submodule(name).weight.shape[1])
        for name in layers
    }
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(torch.no_grad())
        for name, accumulator in sums.items():

            def look(
                module: object, args: Any, accumulator: MomentAccumulator = accumulator
            ) -> None:
                accumulator.update(args[0])

            module = model.get_submodule(name)
            handle = module.register_forward_pre_hook(look)
            stack.callback(handle.remove)
        for batch in torch.split(windows, BATCH):
            model(input_ids=batch, use_cache=False)
    return {name: accumulator.moments() for name, accumulator in sums.items()}


def _read_moments(file: Any, prefix: str) -> Moments:
    return Moments(
        file.get_tensor(f"{prefix}.gram"),
        input_mean=file.get_tensor(f"{prefix}.mean"),
        n_tokens=int(file.get_tensor(f"{prefix}.n_tokens")),
    )


def add_block_option(parser: argparse.ArgumentParser) -> None:
    """Let a command choose the block of its layers."""
    parser.add_argument(
        "--block",
        type=int,
        choices=BLOCKS,
        default=BLOCK,
        help="of the layers, counted from 0; of Mamba the next too (default: %(default)s)",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Capture, and print what there is."""
    parser = argparse.ArgumentParser(description="layers of the packaged models")
    parser.add_argument("folder", type=Path, help="folder of the cache")
    add_block_option(parser)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = [
        f"{layer.name:45} {tuple(layer.weight.shape)} rank {layer.moments.rank}"
        for layer in captured_layers(options.folder, block=options.block)
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""How the inputs of the layers of a pretrained model differ, block by block.

    python -m tests.benchmarks.real_activations MODEL --calibration FILE

Per block: the largest entry of its hidden states over their median, where it is, and which
share of the energy of the inputs of ``down_proj`` and ``o_proj`` is in one token or in one
channel. Massive activations make layer errors look small, because they are in the scale of
the error, and they decide the gram of the matrix that writes them.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.calibration import token_windows
from layerwise.run.models.loading import load_tokenizer
from layerwise.run.models.opening import load_model
from tests.benchmarks.real_cells import LENGTH, WINDOWS

LINEARS = ("self_attn.o_proj", "mlp.down_proj")


def hidden_row(hidden: Tensor) -> list[str]:
    """Largest entry of hidden states (sequences, length, width) and where it is."""
    sizes = hidden.abs().flatten(1).float()
    top = int(sizes.amax(dim=0).argmax())
    largest = float(sizes.max())
    position, channel = divmod(top, hidden.shape[-1])
    ratio = largest / float(sizes.median())
    return [f"{largest:.0f}", f"{ratio:.0f}", f"{position}", f"{channel}"]


def shares(inputs: Tensor) -> list[str]:
    """Shares of the energy of inputs (sequences, length, width) in one place."""
    energy = inputs.double().square()
    total = float(energy.sum())
    first = float(energy[:, 0].sum()) / total
    channel = float(energy.sum(dim=(0, 1)).max()) / total
    return [f"{first:.1%}", f"{channel:.1%}"]


def table(model: Any, tokens: Tensor) -> list[str]:
    """Lines of Markdown."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, args: kept.update({name: args[0].detach()})

    blocks = model.model.layers
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(evaluation_mode(model))
        for index, block in enumerate(blocks):
            names = {f"{index} {name}": block.get_submodule(name) for name in LINEARS}
            for name, module in {str(index): block, **names}.items():
                handle = module.register_forward_pre_hook(keep(name))
                stack.callback(handle.remove)
        model(input_ids=tokens, use_cache=False)
    head = ["block", "largest", "over median", "token", "channel"]
    head += [f"{n.split('.')[1]}: {s}" for n in LINEARS for s in ("token 0", "a channel")]
    lines = [head, ["---"] * len(head)]
    for index in range(len(blocks)):
        figures = [text for name in LINEARS for text in shares(kept[f"{index} {name}"])]
        lines.append([str(index), *hidden_row(kept[str(index)]), *figures])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Inputs of the layers of a model.")
    parser.add_argument("model", type=Path, help="checkpoint folder of LLaMA type")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    arguments = parser.parse_args()
    checkpoint = Checkpoint.open(arguments.model)
    windows = token_windows(
        str(arguments.calibration),
        load_tokenizer(checkpoint),
        n_sequences=WINDOWS,
        sequence_length=LENGTH,
    )
    lines = table(load_model(checkpoint), windows.tokens)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

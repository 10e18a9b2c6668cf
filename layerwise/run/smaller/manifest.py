"""What a folder with a smaller model holds: its tensors, and a manifest of what changed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from layerwise.run.atomic import atomic_write
from layerwise.run.checkpoints.loading import quiet_transformers
from layerwise.run.checkpoints.storage import Checkpoint, checkpoint_names
from layerwise.run.outputs.journal import FOLDER
from layerwise.run.smaller.native import save_native
from layerwise.run.smaller.structure import OutputFormat
from layerwise.run.smaller.surgery import Cut

CHANNELS = "channels.json"


class Smaller(BaseModel):
    """What a manifest states about a model that lost channels.

    Parameters
    ----------
    format
        As it was asked for; a padded folder is one that stock transformers opens.
    changed
        Shape of every tensor that was cut, refitted, added or cast, by its name.
    parameters_before, parameters_after
        Of the decoder blocks.
    predicted_loss, price
        Growth of the mean loss of a token that the optimised widths should cost, and its
        slope per parameter at the budget; None where no widths were optimised.
    """

    model_config = ConfigDict(extra="forbid")

    format: OutputFormat
    changed: dict[str, list[int]]
    parameters_before: int
    parameters_after: int
    predicted_loss: float | None = None
    price: float | None = None


def write_smaller(
    folder: Path, model: Any, source: Checkpoint | None, tokenizer: Any, native: bool
) -> Checkpoint:
    """Write the tensors and configuration of a smaller model, and what travels with it."""
    if native:
        save_native(model, folder)
    else:
        with quiet_transformers():
            model.save_pretrained(folder)
    if source is not None:
        for name in source.side_files():
            if not (folder / name).exists() and not name.endswith(".index.json"):
                (folder / name).parent.mkdir(exist_ok=True)
                atomic_write(folder / name, (source.path / name).read_bytes())
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Checkpoint.open(folder)


def write_channels(folder: Path, cuts: Sequence[Cut]) -> None:
    """Write which units stayed: block -> coupling -> indices in the source."""
    kept: dict[str, dict[str, list[int]]] = {}
    for cut in cuts:
        kept.setdefault(cut.block, {})[cut.coupling] = cut.kept.tolist()
    text = json.dumps(kept, separators=(",", ":"))
    atomic_write(folder / FOLDER / CHANNELS, text.encode())


def parameters_of(blocks: Mapping[str, nn.Module]) -> int:
    """Number of parameters of the decoder blocks."""
    return sum(p.numel() for block in blocks.values() for p in block.parameters())


def digests(model: nn.Module) -> dict[str, str]:
    """Hash of the bytes of every tensor of a model, by name."""
    return {
        name: hashlib.sha256(bytes_of(tensor.detach().cpu())).hexdigest()
        for name, tensor in model.state_dict().items()
    }


def describe(
    model: nn.Module,
    written: Checkpoint,
    before: Mapping[str, str],
    parameters: tuple[int, int],  # of the blocks, before and after
    format: OutputFormat,
) -> tuple[Smaller, dict[str, str]]:
    """Statement of the manifest, and the hashes of all tensors that did not change.

    Parameters
    ----------
    model, written
        The smaller model, and its folder.
    before
        :func:`digests` of the model as it was.
    parameters, format
        Of the blocks, before and after; and what was asked for.
    """
    now, entries = digests(model), written.entries()
    places = {name: name for name in now} | checkpoint_names(model, written)
    same = {places[name]: now[name] for name in now if before.get(name) == now[name]}
    untouched = {name: digest for name, digest in same.items() if name in entries}
    changed = sorted(set(entries) - set(untouched))
    smaller = Smaller(
        format=format,
        changed={name: list(entries[name].shape) for name in changed},
        parameters_before=parameters[0],
        parameters_after=parameters[1],
    )
    return smaller, untouched


def bytes_of(tensor: Tensor) -> Any:
    """Bytes of a tensor on the CPU, as a file holds them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()

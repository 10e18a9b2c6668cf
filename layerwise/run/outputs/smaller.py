"""Files of a folder with a smaller model: its tensors, and a statement of the changes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.hashes import digests
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.accounts import checkpoint_names
from layerwise.run.models.loading import quiet_transformers
from layerwise.run.models.native import save_native
from layerwise.run.models.stock import OutputFormat
from layerwise.run.models.surgery import Cut
from layerwise.run.pipeline.destination import FOLDER
from layerwise.run.pipeline.removal import Shrunk

CHANNELS = "channels.json"


class Smaller(BaseModel):
    """Statement of a manifest about a model that lost channels.

    Parameters
    ----------
    format
        The requested format; stock transformers opens a padded folder as well.
    changed
        Shape of every tensor that was cut, refitted, added or cast, by its name.
    parameters_before, parameters_after
        Number of parameters of the decoder blocks.
    predicted_loss, price
        Predicted growth of the mean loss of a token for the optimised widths, and its slope
        per parameter at the budget; None if no widths were optimised.
    """

    model_config = ConfigDict(extra="forbid")

    format: OutputFormat
    changed: dict[str, list[int]]
    parameters_before: int
    parameters_after: int
    predicted_loss: float | None = None
    price: float | None = None


def write_smaller(
    folder: Path, model: Any, source: Checkpoint | None, tokenizer: Any, shrunk: Shrunk
) -> Checkpoint:
    """Write the tensors, configuration and side files of a smaller model."""
    if shrunk.format == "native":
        save_native(model, folder)
    else:
        with quiet_transformers():
            model.save_pretrained(folder)
    if shrunk.types is not None:
        shrunk.types.name_in(folder, model)
    if source is not None:
        for name in source.side_files():
            if not (folder / name).exists() and not name.endswith(".index.json"):
                source.copy_side_file(name, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return Checkpoint.open(folder)


def write_channels(folder: Path, cuts: Sequence[Cut]) -> None:
    """Write the kept units: block -> coupling -> indices in the source."""
    kept: dict[str, dict[str, list[int]]] = {}
    for cut in cuts:
        kept.setdefault(cut.block, {})[cut.coupling] = cut.kept.tolist()
    text = json.dumps(kept, separators=(",", ":"))
    atomic_write(folder / FOLDER / CHANNELS, text.encode())


def describe(
    model: nn.Module, written: Checkpoint, shrunk: Shrunk
) -> tuple[Smaller, dict[str, str]]:
    """Statement for the manifest, and the hashes of all unchanged tensors.

    Parameters
    ----------
    model, written
        The smaller model, and its folder.
    shrunk
        Description of the removal, with the hashes of the dense model.
    """
    now, entries = digests(model), written.entries()
    stored = {name: name for name in now} | checkpoint_names(model, written)
    same = {stored[name]: now[name] for name in now if shrunk.before.get(name) == now[name]}
    untouched = {name: digest for name, digest in same.items() if name in entries}
    changed = sorted(set(entries) - set(untouched))
    smaller = Smaller(
        format=shrunk.format,
        changed={name: list(entries[name].shape) for name in changed},
        parameters_before=shrunk.parameters_before,
        parameters_after=shrunk.parameters_after,
        predicted_loss=shrunk.predicted_loss,
        price=shrunk.price,
    )
    return smaller, untouched

"""The retrained folder: a copy of the pruned folder with new tensors and the records."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from layerwise.recovery.pruned import CARD, Pruned
from layerwise.recovery.records import UnitRecord
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.files import copy_file, read_bytes
from layerwise.run.checkpoints.storage import Checkpoint, write_checkpoint
from layerwise.run.models.accounts import checkpoint_names
from layerwise.run.models.stored_types import in_stored_type
from layerwise.run.outputs.output import MANIFEST, written_files
from layerwise.run.pipeline.destination import FINGERPRINT, FOLDER
from layerwise.run.pipeline.journal import Journal

RECORDS = "retraining.jsonl"
SETTINGS = "retrain.yaml"
RECIPE = "recipe.yaml"


def write_retrained(
    pruned: Pruned,
    values: Mapping[str, Tensor],
    records: Sequence[UnitRecord],
    settings: Mapping[str, Any],
    journal: Journal,
) -> None:
    """Write the retrained model into the partial folder; the manifest comes last.

    Parameters
    ----------
    pruned
        The model and its folder, whose masks and layer log are copied.
    values
        New values by parameter name.
    records, settings
        Figures of every unit, and the arguments.
    journal
        The partial folder.
    """
    folder, (source, manifest) = journal.folder, pruned.stored()
    names = checkpoint_names(pruned.model, source)
    stored = {
        names[name]: in_stored_type(source, names[name], value) + 0.0  # none is negative
        for name, value in values.items()
    }
    write_checkpoint(source, folder, stored, overwrite=True)
    ours = source.path / FOLDER
    for path in sorted(ours.iterdir()):
        if path.is_file() and path.name not in (MANIFEST, FINGERPRINT, "report.html"):
            copy_file(path, folder / FOLDER / path.name)
    if (source.path / RECIPE).is_file():
        copy_file(source.path / RECIPE, folder / RECIPE)
    _write_card(source.path / CARD, folder / CARD, records, settings)
    lines = "".join(json.dumps(record.to_dict()) + "\n" for record in records)
    atomic_write(folder / FOLDER / RECORDS, lines.encode())
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    atomic_write(folder / SETTINGS, text.encode())
    written = Checkpoint.open(folder)
    claims = manifest.model_copy(
        update={
            "shards": written.sha256(written.shards),
            "files": written_files(folder, written.shards),
            "retrained": sorted({*manifest.retrained, *stored}),
            "untouched": {n: h for n, h in manifest.untouched.items() if n not in stored},
        }
    )
    data = json.dumps(claims.model_dump(), indent=1, sort_keys=True)
    atomic_write(folder / FOLDER / MANIFEST, data.encode())


def _write_card(
    path: Path, target: Path, records: Sequence[UnitRecord], settings: Mapping[str, Any]
) -> None:
    """Card of the pruned model with a section about the retraining."""
    card = read_bytes(path).decode(errors="replace") if path.is_file() else ""
    count, better = len(records), sum(r.after < r.before for r in records)
    before, after = (
        sum(getattr(r, name) for r in records) / count for name in ("before", "after")
    )
    what = "held-out loss" if settings["objective"] == "tokens" else "held-out error"
    section = f"""
## Retrained

`{settings["parameters"]}` for the objective `{settings["objective"]}`, masks fixed.
Mean {what} {before:.4f} before, {after:.4f} after; {better} of {count} units became
better. `retrain.yaml` has the arguments; errors above are those before it.
"""
    atomic_write(target, (card + section).encode())

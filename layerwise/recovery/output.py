"""What a retrained folder holds: the pruned folder, some tensors anew, and the figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from layerwise.errors import DataError
from layerwise.recovery.pruned import Pruned
from layerwise.recovery.reconstruct import UnitRecord
from layerwise.run.atomic import atomic_write
from layerwise.run.journal import FINGERPRINT, FOLDER, Journal
from layerwise.run.output import MANIFEST
from layerwise.run.quoting import one_line
from layerwise.run.storage import checkpoint_names, write_checkpoint

RECORDS = "retraining.jsonl"
SETTINGS = "retrain.yaml"
CARD = "README.md"


def write_retrained(
    journal: Journal,
    pruned: Pruned,
    values: Mapping[str, Tensor],
    records: Sequence[UnitRecord],
    settings: Mapping[str, Any],
) -> None:
    """Write the retrained model into the partial folder; the manifest comes last.

    Parameters
    ----------
    journal
        The partial folder.
    pruned
        The model, and the folder that it came from: masks and layer log are copied.
    values
        New values by parameter name.
    records, settings
        What was done.
    """
    folder, source, manifest = journal.folder, pruned.source, pruned.manifest
    assert source is not None
    assert manifest is not None
    names = checkpoint_names(pruned.model, source)
    stored = {names[name]: value for name, value in values.items()}
    write_checkpoint(source, folder, stored, overwrite=True)
    ours = source.path / FOLDER
    for path in sorted(ours.iterdir()):
        if path.is_file() and path.name not in (MANIFEST, FINGERPRINT, "report.html"):
            _copy(path, folder / FOLDER / path.name)
    for name in ("recipe.yaml", CARD):
        if (source.path / name).is_file():
            _copy(source.path / name, folder / name)
    lines = "".join(json.dumps(record.to_dict()) + "\n" for record in records)
    atomic_write(folder / FOLDER / RECORDS, lines.encode())
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    atomic_write(folder / SETTINGS, text.encode())
    claims = manifest.model_copy(
        update={
            "retrained": sorted({*manifest.retrained, *stored}),
            "untouched": {n: h for n, h in manifest.untouched.items() if n not in stored},
        }
    )
    data = json.dumps(claims.model_dump(), indent=1, sort_keys=True)
    atomic_write(folder / FOLDER / MANIFEST, data.encode())


def _copy(path: Path, target: Path) -> None:
    try:
        data = path.read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {one_line(error)}"
        raise DataError(message) from error
    atomic_write(target, data)

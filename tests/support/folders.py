"""Contents of folders, to compare two of them."""

from dataclasses import replace
from pathlib import Path

from layerwise.run.pipeline.journal import read_layers
from layerwise.run.pipeline.records import LayerRecord


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, except the file with times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "layers.jsonl"
    }


def without_time(folder: Path) -> list[LayerRecord]:
    """Figures of a run, finished or not, without the seconds."""
    return [replace(record, seconds=0.0) for record in read_layers(folder)]

"""A gram folder: the layer problems of a dense model, usable without model and data.

Every file holds one stage, the linear layers of a block that read the same inputs, with
their shared moments and their weights (:mod:`layerwise.grams.layer_files`). Moments are in
float64, in which they were summed. So solutions are the same, byte for byte, as those of
``prune --error-correction none``; in float32 near ties could be decided differently.
``manifest.json`` lists the files of the folder, each with its hash.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from layerwise.errors import DataError
from layerwise.grams.layer_files import layer_tensors
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.hashes import file_sha256
from layerwise.run.checkpoints.shard import read_header
from layerwise.run.checkpoints.strict_json import read_object
from layerwise.run.checkpoints.validation import confined
from layerwise.run.outputs.recipe import Recipe

MANIFEST = "manifest.json"
PLAIN_NAME = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)


class StoredMatrix(BaseModel):
    """One layer of a stage.

    Parameters
    ----------
    shape
        (out, in).
    tensor
        Name of its weight in the checkpoint.
    transposed
        Whether the checkpoint stores the weight as (in, out).
    """

    model_config = ConfigDict(extra="forbid")

    shape: tuple[int, int]
    tensor: str
    transposed: bool = False


class StageFile(BaseModel):
    """One file: its hash, and its layers by the name of the linear module."""

    model_config = ConfigDict(extra="forbid")

    sha256: str
    layers: dict[str, StoredMatrix]


class GramManifest(BaseModel):
    """Content of ``manifest.json`` of a gram folder.

    Parameters
    ----------
    format
        Version of the format.
    recipe
        The arguments of the run, as for a prune without error correction.
    model_type
        Family of the model.
    source
        Hash of every file of the checkpoint.
    calibration, calibration_sha256
        Source of the token windows, for people, and their hash.
    versions
        Versions of the packages that computed the moments.
    files
        Stages by file name, in the order of the data flow.
    """

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    recipe: Recipe
    model_type: str
    source: dict[str, str]
    calibration: str
    calibration_sha256: str
    versions: dict[str, str]
    files: dict[str, StageFile]

    def layers(self) -> Iterator[tuple[str, str, StoredMatrix]]:
        """File, name and description of every layer, in the order of the model."""
        for file, stage in self.files.items():
            for name, layer in stage.layers.items():
                yield file, name, layer

    def write(self, folder: Path) -> None:
        """Write the manifest into its folder."""
        text = json.dumps(self.model_dump(mode="json", exclude_unset=True), indent=1)
        atomic_write(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> GramManifest:
    """Read the manifest of a gram folder, and check that all files are unchanged.

    Every file is read once for its hash. Its moments are checked when they are used.

    Raises
    ------
    DataError
        The manifest is missing or damaged; or a file is missing, is outside the folder, or
        has other bytes or other layers than the manifest says.
    """
    path = folder / MANIFEST
    if not path.is_file():
        message = f"{folder} holds no {MANIFEST}: create the folder by layerwise calibrate"
        raise DataError(message)
    try:
        manifest = GramManifest.model_validate(read_object(confined(path)))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{path} is damaged: {where}: {first['msg']}; calibrate again"
        raise DataError(message) from error
    if manifest.format != 1:
        message = (
            f"{path} has format {manifest.format}, this layerwise reads 1: calibrate again"
        )
        raise DataError(message)
    _check_names(path, manifest)
    for name, stage in manifest.files.items():
        _check_file(folder / name, stage)
    return manifest


def _check_names(path: Path, manifest: GramManifest) -> None:
    layers = [name for _, name, _ in manifest.layers()]
    if not layers:
        message = f"{path} lists no layers: calibrate again"
        raise DataError(message)
    if twice := [name for name in layers if layers.count(name) > 1]:
        message = f"{path} lists the layer {twice[0]!r} twice: calibrate again"
        raise DataError(message)
    for name in manifest.files:
        if not PLAIN_NAME.fullmatch(name):
            message = (
                f"{path} lists the file {name!r}: files must be *.safetensors in the same "
                f"folder; calibrate again"
            )
            raise DataError(message)


def _check_file(path: Path, stage: StageFile) -> None:
    if not path.is_file():
        message = f"{path} is listed in the manifest but missing: calibrate again"
        raise DataError(message)
    digest = file_sha256(confined(path))
    if digest != stage.sha256:
        message = (
            f"{path} has the sha256 {digest[:12]}..., the manifest says "
            f"{stage.sha256[:12]}...: restore the file or calibrate again"
        )
        raise DataError(message)
    header = read_header(path)
    layers = layer_tensors(path, header)
    shapes: dict[str, Any] = {
        name: header.tensors[tensors["weight"]].shape for name, tensors in layers.items()
    }
    if shapes != {name: layer.shape for name, layer in stage.layers.items()}:
        message = f"{path} holds other layers than the manifest says: calibrate again"
        raise DataError(message)

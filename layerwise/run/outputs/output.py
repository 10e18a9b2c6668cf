"""Files of a finished folder besides the weights: recipe, manifest, model card.

The manifest lists the pruned tensors and the hashes of all others, so that ``layerwise
verify`` does not need the source.
"""

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from layerwise.adapters.linear import is_transposed
from layerwise.errors import DataError, VerificationError
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.files import read_bytes
from layerwise.run.checkpoints.hashes import (
    bytes_sha256,
    file_sha256,
    parameters_sha256,
    tensor_hashes,
)
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.checkpoints.storage import Checkpoint, write_checkpoint
from layerwise.run.checkpoints.strict_json import read_object
from layerwise.run.data.calibration import Calibration
from layerwise.run.models.accounts import checkpoint_names
from layerwise.run.outputs.model_card import model_card
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.outputs.smaller import Smaller, describe, write_channels, write_smaller
from layerwise.run.pipeline.destination import BLOCKS, FINGERPRINT, FOLDER
from layerwise.run.pipeline.journal import MASKS, Journal, read_masks
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.removal import Removed, Run, Shrunk
from layerwise.run.pipeline.solver_identity import own_solver
from layerwise.solver import Solver

MANIFEST = "manifest.json"
PACKAGES = ("layerwise", "torch", "transformers", "safetensors")


class Manifest(BaseModel):
    """Content of ``layerwise/manifest.json``."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    sparsity: str
    group: str
    keep_zeros: bool = False  # whether there may be more zeros than the sparsity says
    pruned: dict[str, str]  # parameter name -> tensor name in the checkpoint
    transposed: list[str] = []  # pruned parameters that are stored as (in, out)
    untouched: dict[str, str]  # tensor name -> sha256 of its bytes in the source
    shards: dict[str, str] = {}  # file name -> sha256, of what the run wrote
    files: dict[str, str] = {}  # all other files but this, logs without their seconds
    retrained: list[str] = []  # tensors that `layerwise retrain` changed
    source: dict[str, str]  # file name -> sha256
    calibration: str
    calibration_sha256: str
    bos: str = "never"  # "always" if every calibration window begins with BOS
    versions: dict[str, str]
    smaller: Smaller | None = None  # for a model that lost channels

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a finished folder."""
        path = folder / FOLDER / MANIFEST
        if not path.is_file():
            message = (
                f"{folder} holds no {FOLDER}/{MANIFEST}: it is not an output of layerwise"
            )
            raise DataError(message)
        try:
            return cls.model_validate(read_object(path))
        except ValidationError as error:
            message = f"{path} is damaged: {error.errors()[0]['msg']}"
            raise DataError(message) from error

    def changed(self, folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
        """Names of files that are not as the run wrote them, with the reason.

        Parameters
        ----------
        folder
            The finished folder.
        names
            Other files than tensors to look at; by default all.
        """
        problems = {}
        for name in sorted(self.files if names is None else set(names) & set(self.files)):
            path = folder / name
            if not _inside(path, folder):
                problems[name] = "is missing"
            elif content_sha256(path) != self.files[name]:
                problems[name] = "other bytes"
        return problems

    def refuse_changed(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Refuse files that are not as the run wrote them.

        Raises
        ------
        VerificationError
            One is missing or has other bytes.
        """
        for name, problem in self.changed(folder, names).items():
            message = (
                f"{folder / name} is not as the run wrote it ({problem}): restore it, or "
                f"prune again"
            )
            raise VerificationError(message)


def written_files(folder: Path, shards: Iterable[str]) -> dict[str, str]:
    """Hash of every file of a folder that will be finished, besides shards and manifest."""
    ours = folder / FOLDER
    hidden = {ours / MANIFEST, ours / FINGERPRINT, *(folder / name for name in shards)}
    return {
        path.relative_to(folder).as_posix(): content_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path not in hidden and ours / BLOCKS not in path.parents
    }


def content_sha256(path: Path) -> str:
    """Hash of a file, of a log without its seconds: only they differ in a second run."""
    if path.suffix != ".jsonl":
        return file_sha256(path)
    data = read_bytes(path)
    try:
        lines = [json.loads(line) for line in data.splitlines()]
        figures = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    except (AttributeError, RecursionError, ValueError):  # it is no log any more
        return bytes_sha256(data)
    return bytes_sha256(json.dumps(figures).encode())


def _inside(path: Path, folder: Path) -> bool:
    """Whether a name of a manifest is that of a regular file in its folder."""
    try:
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):
        return False


def fingerprint(
    recipe: Recipe, run: Run[Any], solver: Solver | None = None
) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    opened, device = run.opened, run.task.device
    weights = (
        {"parameters": parameters_sha256(opened.model)}
        if opened.source is None
        else opened.source.sha256()
    )
    settings = recipe.model_dump(mode="json", exclude={"model"})
    return {
        **settings,
        **({} if solver is None else own_solver(solver)),
        "calibration": run.tokens.sha256,
        "weights": weights,
        "versions": versions(),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute the result."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            installed[package] = "unknown"
    return installed


@dataclass(frozen=True, eq=False)
class Outcome:
    """Everything about a run that is written into its folder.

    Parameters
    ----------
    recipe, tokens, records
        The settings, the calibration data, and the figures of every matrix.
    source, tokenizer
        The checkpoint of the model; without a source the tokenizer is saved as well.
    """

    recipe: Recipe
    tokens: Calibration
    records: Sequence[LayerRecord]
    source: Checkpoint | None
    tokenizer: Any


def write_output(outcome: Outcome, model: Any, removed: Removed, journal: Journal) -> None:
    """Write the pruned model into the partial folder; the manifest comes last."""
    if removed.shrunk is None:
        _write_zeros(journal, outcome, model, removed)
    else:
        _write_shrunk(journal, outcome, model, removed.shrunk)


def stored_masks(output: Path | None, masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Masks of a finished run: read from its folder when they are used, if it has them."""
    if output is None or not (output / FOLDER / MASKS).is_file():
        return dict(masks)
    return LazyTensors(masks, read_masks(output).__getitem__)


def _write_zeros(journal: Journal, outcome: Outcome, model: Any, removed: Removed) -> None:
    """Write a model with zeros: the checkpoint with other values of some tensors."""
    folder, source, weights = journal.folder, outcome.source, removed.weights
    if source is not None:
        names = checkpoint_names(model, source)
        parameters = {names[name]: name for name in weights}
        stored = LazyTensors(parameters, lambda name: weights[parameters[name]])
        write_checkpoint(source, folder, stored, overwrite=True)
    else:
        model.save_pretrained(folder)
        if outcome.tokenizer is not None:
            outcome.tokenizer.save_pretrained(folder)
        source = Checkpoint.open(folder)
        names = checkpoint_names(model, source)
    pruned = {name: names[name] for name in weights}
    shapes = {name: model.get_parameter(name).shape for name in removed.masks}
    journal.write_masks(removed.masks, shapes)
    write_rest(
        journal,
        outcome,
        source,
        pruned=pruned,
        transposed=[name for name in weights if _is_transposed(model, name)],
        untouched=tensor_hashes(
            source.tensors(set(source.weight_map) - set(pruned.values()))
        ),
    )


def _write_shrunk(journal: Journal, outcome: Outcome, model: Any, shrunk: Shrunk) -> None:
    """Write a smaller model: all of its tensors, and the record of its cuts."""
    folder = journal.folder
    written = write_smaller(folder, model, outcome.source, outcome.tokenizer, shrunk)
    write_channels(folder, shrunk.cuts)
    smaller, untouched = describe(model, written, shrunk)
    if shrunk.types is not None:
        shrunk.types.restore(model)
    source = outcome.source or written
    write_rest(journal, outcome, source, pruned={}, untouched=untouched, smaller=smaller)


def write_rest(
    journal: Journal, outcome: Outcome, source: Checkpoint, **claims: Any
) -> None:
    """Write log, recipe, model card, and the manifest with its claims."""
    folder, recipe, tokens = journal.folder, outcome.recipe, outcome.tokens
    journal.write_layers(list(outcome.records))
    atomic_write(folder / "recipe.yaml", recipe.to_yaml().encode())
    written = Checkpoint.open(folder)
    smaller = claims.get("smaller")
    card = model_card(recipe, source, outcome.records, smaller)
    atomic_write(folder / "README.md", card.encode())
    manifest = Manifest(
        shards=written.sha256(written.shards),
        files=written_files(folder, written.shards),
        sparsity=str(recipe.sparsity or 0.0),
        group=recipe.group,
        keep_zeros=bool(recipe.keep_zeros),
        source=source.sha256(),
        calibration=tokens.source,
        calibration_sha256=tokens.sha256,
        bos=recipe.bos,
        versions=versions(),
        **claims,
    )
    text = json.dumps(manifest.model_dump(), indent=1, sort_keys=True)
    atomic_write(folder / FOLDER / MANIFEST, text.encode())


def _is_transposed(model: nn.Module, parameter: str) -> bool:
    return is_transposed(model.get_submodule(parameter.removesuffix(".weight")))

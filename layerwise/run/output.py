"""What a finished folder holds besides the weights: recipe, manifest, model card.

The manifest says which tensors were pruned and the hash of every tensor that was not, so
that ``layerwise verify`` needs neither the source nor trust.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from layerwise.adapters.linear import is_transposed
from layerwise.errors import DataError
from layerwise.run.atomic import atomic_write
from layerwise.run.calibration import Calibration
from layerwise.run.journal import FOLDER, Journal
from layerwise.run.recipe import Recipe
from layerwise.run.records import LayerRecord
from layerwise.run.storage import Checkpoint, checkpoint_names, write_checkpoint
from layerwise.run.strict_json import read_object

MANIFEST = "manifest.json"
PACKAGES = ("layerwise", "torch", "transformers", "safetensors")


class Manifest(BaseModel):
    """What ``layerwise/manifest.json`` states about its folder."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    sparsity: str
    group: str
    pruned: dict[str, str]  # parameter name -> tensor name in the checkpoint
    transposed: list[str] = []  # pruned parameters that are stored as (in, out)
    untouched: dict[str, str]  # tensor name -> sha256 of its bytes in the source
    source: dict[str, str]  # file name -> sha256
    calibration: str
    calibration_sha256: str
    versions: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Manifest of a finished folder."""
        path = folder / FOLDER / MANIFEST
        if not path.is_file():
            message = f"{folder} holds no {FOLDER}/{MANIFEST}: it is no output of layerwise"
            raise DataError(message)
        try:
            return cls.model_validate(read_object(path))
        except ValidationError as error:
            message = f"{path} is damaged: {error.errors()[0]['msg']}"
            raise DataError(message) from error


def fingerprint(
    recipe: Recipe,
    tokens: Calibration,
    source: Checkpoint | None,
    model: nn.Module,
    device: torch.device,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result."""
    weights = source.sha256() if source else {"parameters": _parameters_sha256(model)}
    settings = recipe.model_dump(mode="json", exclude={"model"})
    return {
        **settings,
        "calibration": tokens.sha256,
        "weights": weights,
        "versions": versions(),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def versions() -> dict[str, str]:
    """Versions of what computes the result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that is not installed
            found[package] = "unknown"
    return found


def write_output(
    journal: Journal,
    recipe: Recipe,
    tokens: Calibration,
    source: Checkpoint | None,
    model: Any,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    records: Sequence[LayerRecord],
    tokenizer: Any,
) -> None:
    """Write everything into the partial folder; the manifest comes last."""
    folder = journal.folder
    if source is not None:
        names = checkpoint_names(model, source)
        stored = {names[name]: weight for name, weight in weights.items()}
        write_checkpoint(source, folder, stored, overwrite=True)
    else:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        source = Checkpoint.open(folder)
        names = checkpoint_names(model, source)
    pruned = {name: names[name] for name in weights}
    journal.write_masks(masks)
    journal.write_layers(list(records))
    atomic_write(folder / "recipe.yaml", recipe.to_yaml().encode())
    atomic_write(folder / "README.md", _model_card(recipe, source, records).encode())
    manifest = Manifest(
        sparsity=str(recipe.sparsity),
        group=recipe.group,
        pruned=pruned,
        transposed=[name for name in weights if _is_transposed(model, name)],
        untouched=tensor_hashes(source, set(source.weight_map) - set(pruned.values())),
        source=source.sha256(),
        calibration=tokens.source,
        calibration_sha256=tokens.sha256,
        versions=versions(),
    )
    text = json.dumps(manifest.model_dump(), indent=1, sort_keys=True)
    atomic_write(folder / FOLDER / MANIFEST, text.encode())


def _is_transposed(model: nn.Module, parameter: str) -> bool:
    return is_transposed(model.get_submodule(parameter.removesuffix(".weight")))


def tensor_hashes(checkpoint: Checkpoint, names: set[str]) -> dict[str, str]:
    """Hash of the bytes of some tensors."""
    return {
        name: hashlib.sha256(_bytes_of(tensor)).hexdigest()
        for name, tensor in checkpoint.tensors(sorted(names))
    }


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _parameters_sha256(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(_bytes_of(parameter.detach().cpu()))
    return digest.hexdigest()


def _model_card(recipe: Recipe, source: Checkpoint, records: Sequence[LayerRecord]) -> str:
    """README.md of the pruned model, with the header that the model hub reads."""
    base = source.config.get("_name_or_path") or recipe.model or "unknown"
    error = sum(record.relative_error for record in records) / len(records)
    worst = max(records, key=lambda record: record.relative_error)
    sparsity = sum(record.sparsity for record in records) / len(records)
    return f"""---
base_model: {json.dumps(str(base))}
library_name: transformers
pipeline_tag: text-generation
tags:
- pruned
- sparse
- layerwise
---

# Pruned with layerwise

{len(records)} linear layers of the decoder blocks were pruned; every other tensor has the
bytes of the source. The files are ordinary dense tensors with zeros and open with
`AutoModelForCausalLM.from_pretrained`.

| | |
|---|---|
| method | `{recipe.method}` |
| sparsity | {recipe.sparsity} asked for, {sparsity:.4f} zeros in the pruned layers |
| calibration | {recipe.calibration} |
| calibration tokens | {recipe.n_sequences} x {recipe.sequence_length} |
| error correction | {recipe.error_correction} |
| mean relative error of a layer | {error:.4f} |
| worst layer | `{worst.name}`, {worst.relative_error:.4f} |

`recipe.yaml` repeats the run, `layerwise/layers.jsonl` holds the figures of every layer,
`layerwise/masks.safetensors` the masks, and `layerwise verify` checks all of it.
"""

"""Verification of a finished folder: reopen it and check every tensor."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import DataError, InvalidProblemError, LayerwiseError
from layerwise.patterns import Pattern, parse_pattern
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model
from layerwise.run.outputs.checks import Check, files, shards, untouched
from layerwise.run.outputs.output import MANIFEST, Manifest
from layerwise.run.outputs.verify_smaller import verify_smaller
from layerwise.run.pipeline.destination import FOLDER
from layerwise.run.pipeline.journal import read_layers, read_masks
from layerwise.run.pipeline.kept_zeros import holds_at_least
from layerwise.run.steps import counted


def verify(folder: Path) -> list[Check]:
    """Check a folder that ``layerwise prune`` wrote.

    Parameters
    ----------
    folder
        The output folder.

    Returns
    -------
    list of Check
        Zeros off the mask, pattern, finite values, no negative zeros, untouched tensors,
        unchanged files, the layer log, and whether stock transformers opens it. Of a
        smaller model see :mod:`layerwise.run.outputs.verify_smaller`.

    Raises
    ------
    DataError
        If the folder is not an output of layerwise or cannot be read.
    """
    manifest = Manifest.read(folder)
    checkpoint = Checkpoint.open(folder)
    if manifest.smaller is not None:
        return verify_smaller(folder, checkpoint, manifest, manifest.smaller)
    masks = read_masks(folder)
    pattern = _pattern(folder, manifest)
    holds = holds_at_least if manifest.keep_zeros else type(pattern).accepts
    findings = _Findings(pattern, holds)
    findings.compare("mask", sorted(manifest.pruned), sorted(masks))
    tensors = set(manifest.pruned.values())
    lost = sorted(tensors - set(checkpoint.weight_map))
    findings.missing += [f"{name}: the tensor is missing" for name in lost]
    names = {tensor: name for name, tensor in manifest.pruned.items()}
    present = tensors.difference(lost)
    text = f"checking {len(present)} pruned tensors"
    stored = checkpoint.tensors(present)
    for tensor_name, weight in counted(stored, len(present), text):
        name = names[tensor_name]
        if name in masks:
            mask = masks[name]
            if name in manifest.transposed:  # patterns refer to (out, in)
                weight, mask = weight.transpose(0, -1), mask.transpose(0, -1)
            findings.inspect(tensor_name, weight, mask)
    for name in set(masks).difference(manifest.pruned):
        masks[name]  # a damaged mask is an error, even without a pruned tensor
    asked = f"{pattern} or has more zeros" if manifest.keep_zeros else pattern
    recorded = [f"{record.name}.weight" for record in read_layers(folder)]
    findings.compare("layer log", sorted(manifest.pruned), sorted(recorded))
    return [
        Check(
            f"{len(manifest.pruned)} pruned tensors, a mask and a line of the log for each",
            tuple(findings.missing),
        ),
        Check("every removed weight is exactly zero", tuple(findings.nonzero)),
        Check("no zero of a pruned tensor is negative", tuple(findings.negative)),
        Check(f"every mask satisfies the pattern {asked}", tuple(findings.pattern)),
        Check("every pruned weight is finite", tuple(findings.infinite)),
        untouched(checkpoint, manifest, set(manifest.pruned.values())),
        shards(checkpoint, manifest),
        files(checkpoint, manifest),
        _opens(checkpoint),
    ]


def _pattern(folder: Path, manifest: Manifest) -> Pattern:
    try:
        return parse_pattern(
            manifest.sparsity, "layer" if manifest.group == "layer" else "row"
        )
    except InvalidProblemError as error:
        message = f"{folder / FOLDER / MANIFEST} is damaged: {error}"
        raise DataError(message) from error


class _Findings:
    def __init__(self, pattern: Pattern, holds: Callable[[Any, Tensor], bool]) -> None:
        self._pattern, self._holds = pattern, holds
        self.missing: list[str] = []
        self.nonzero: list[str] = []
        self.negative: list[str] = []
        self.pattern: list[str] = []
        self.infinite: list[str] = []

    def compare(self, what: str, expected: list[str], present: list[str]) -> None:
        counts = Counter(present)
        counts.subtract(expected)
        self.missing += [
            f"{name}: {'no' if count < 0 else 'one too many'} {what}"
            for name, count in sorted(counts.items())
            if count
        ]

    def inspect(self, name: str, weight: Tensor, mask: Tensor) -> None:
        if tuple(weight.shape) != tuple(mask.shape):
            self.missing.append(f"{name}: mask {tuple(mask.shape)}, {tuple(weight.shape)}")
            return
        if mask.dim() != 2:
            self.missing.append(f"{name}: {mask.dim()} dimensions, not a matrix")
            return
        outside = int((weight[~mask] != 0).sum())
        if outside:
            self.nonzero.append(f"{name}: {outside} removed weights are not zero")
        negative = int((torch.signbit(weight) & (weight == 0)).sum())
        if negative:
            self.negative.append(f"{name}: {negative} of its zeros are -0.0")
        rows, width = mask.shape
        try:
            self._pattern.check((rows, width))
            if not self._holds(self._pattern, mask):
                self.pattern.append(f"{name}: another number of zeros")
        except InvalidProblemError as error:
            self.pattern.append(f"{name}: {error}")
        if not bool(torch.isfinite(weight).all()):
            self.infinite.append(f"{name}: not finite")


def _opens(checkpoint: Checkpoint) -> Check:
    claim = "stock transformers opens it, every tensor accounted for"
    try:
        load_model(checkpoint)
    except LayerwiseError as error:
        return Check(claim, (str(error),))
    return Check(claim, ())

"""Checks of a folder, and those that apply to every folder."""

from dataclasses import dataclass

from layerwise.run.checkpoints.hashes import tensor_hashes
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.outputs.output import Manifest
from layerwise.run.steps import counted


@dataclass(frozen=True)
class Check:
    """One claim and whether it holds.

    Parameters
    ----------
    claim
        Statement that should be true.
    problems
        Names for which it is not true, with the reason; empty if the claim holds.
    """

    claim: str
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def untouched(checkpoint: Checkpoint, manifest: Manifest, changed: set[str]) -> Check:
    """Check every tensor that the run should not have changed."""
    changed = changed | set(manifest.retrained)
    names = set(checkpoint.weight_map) - changed
    text = f"hashing {len(names)} other tensors"
    present = tensor_hashes(counted(checkpoint.tensors(names), len(names), text))
    differs = [
        f"{name}: {'other bytes' if name in present else 'is missing'}"
        for name, digest in manifest.untouched.items()
        if present.get(name) != digest
    ]
    extra = [f"{name}: was not in the source" for name in names - set(manifest.untouched)]
    claim = f"{len(manifest.untouched)} other tensors have the bytes of the source"
    return Check(claim, tuple(differs + sorted(extra)))


def files(checkpoint: Checkpoint, manifest: Manifest) -> Check:
    """Check every other file by its hash: configuration, tokenizer, log, recipe, masks."""
    problems = manifest.changed(checkpoint.path)
    if manifest.files:  # those of older versions list none
        extra = set(checkpoint.side_files()) - set(manifest.files)
        problems |= dict.fromkeys(sorted(extra), "the run did not write it")
    claim = f"{len(manifest.files)} other files are as the run wrote them"
    return Check(claim, tuple(f"{name}: {why}" for name, why in problems.items()))


def shards(checkpoint: Checkpoint, manifest: Manifest) -> Check:
    """Check every file with tensors, by its hash."""
    present = checkpoint.sha256(checkpoint.shards)
    differs = [
        f"{name}: {'other bytes' if name in present else 'is missing'}"
        for name, digest in manifest.shards.items()
        if present.get(name) != digest
    ]
    extra = [
        f"{name}: the run did not write it" for name in present.keys() - manifest.shards
    ]
    claim = f"{len(manifest.shards)} files with tensors are as the run wrote them"
    return Check(claim, tuple(differs + sorted(extra)))

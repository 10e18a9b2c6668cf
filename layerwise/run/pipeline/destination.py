"""Output folder of a run: checked, and cleaned up after a killed run, before any work."""

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints.strict_json import read_object

FOLDER = "layerwise"  # inside the output folder: all files that layerwise itself reads
FINGERPRINT = "fingerprint.json"
BLOCKS = "blocks"
LAYERS = "layers.jsonl"
GRAMS_KEY = "calibration_sha256"  # in the manifest of a gram folder


@dataclass(frozen=True)
class Destination:
    """Output folder of a run, and how to treat folders that exist already.

    Parameters
    ----------
    output
        New folder; None if nothing is written.
    resume
        Continue an unfinished run with the same arguments.
    force
        Replace a finished `output`, if layerwise wrote it.
    inputs
        Files and folders that the run reads: the output must not be, or hold, one of them.
    """

    output: Path | None = None
    resume: bool = True
    force: bool = False
    inputs: tuple[Path, ...] = ()

    @classmethod
    def of(
        cls,
        output_dir: str | Path | None,
        *,
        resume: bool,
        force: bool,
        inputs: Iterable[Any] = (),
    ) -> "Destination":
        """Destination from the arguments of a run.

        Parameters
        ----------
        output_dir, resume, force
            As in :func:`layerwise.prune_model`.
        inputs
            Arguments that may name files: models, texts. Names of the hub, and objects,
            are left out.
        """
        output = None if output_dir is None else Path(output_dir)
        files = [path for value in inputs if (path := local_path(value)) is not None]
        return cls(output, resume, force, tuple(files))

    def check(self) -> None:
        """Refuse an output that exists or cannot be created."""
        if self.output is not None:
            check_output(self.output, force=self.force, inputs=self.inputs)


NOWHERE = Destination()


def partial_path(output: Path) -> Path:
    """Folder in which a run works until it has finished."""
    return output.with_name(output.name + ".partial")


def local_path(value: Any) -> Path | None:
    """File or folder that an argument names, ``FILE.jsonl:field`` too; None if none."""
    if not isinstance(value, str | os.PathLike):
        return None
    name = os.fspath(value)
    paths = [Path(name), Path(name.rpartition(":")[0] or name)]
    try:
        return next((path for path in paths if path.exists()), None)
    except OSError:  # a text instead of a name: too long for a file
        return None


def check_output(output: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that exists or cannot be created, before any work is done.

    If an earlier run was killed while it finished, its renaming is completed first, or
    undone if the new folder did not have its name yet.
    """
    if output.name in ("", ".."):
        message = f"{output} does not name a new folder: choose another output"
        raise UsageError(message)
    settle(output)
    refuse_occupied(output, force=force, inputs=inputs)
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        message = f"cannot create {output}: {parent} is not writable; choose another output"
        raise DataError(message)


def refuse_occupied(output: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output that is in the way; nothing is touched.

    Only a folder that layerwise wrote is replaced, and never one that is, or holds, the
    working directory or an input of the run.

    Raises
    ------
    UsageError
        With the reason.
    """
    if not (output.exists() or output.is_symlink()):
        return
    for path in (*inputs, Path.cwd()):
        if path.resolve().is_relative_to(output.resolve()):
            message = f"{output} is or holds {path}, which is in use: choose another output"
            raise UsageError(message)
    if not force:
        message = f"{output} exists; choose another output, or replace it with --force"
        raise UsageError(message)
    if output.is_symlink() or not is_ours(output):
        message = (
            f"{output} is not a folder that layerwise wrote, so --force does not replace "
            f"it: choose another output, or remove it yourself"
        )
        raise UsageError(message)


def is_ours(folder: Path) -> bool:
    """Whether layerwise wrote a folder; an empty folder is nobody's, and counts."""
    if not folder.is_dir():
        return False
    if (folder / FOLDER / LAYERS).is_file() or not any(folder.iterdir()):
        return True
    try:
        return GRAMS_KEY in read_object(folder / "manifest.json")
    except DataError:
        return False


def replaced_path(output: Path) -> Path:
    """Temporary path of an old output while the new one gets its name."""
    return output.with_name(f".{output.name}.replaced")


def settle(output: Path) -> None:
    """Give a replaced output its name back, or clean up a finished run.

    The fingerprint is removed last: it marks a folder that is not cleaned up yet.
    """
    replaced, fingerprint = replaced_path(output), output / FOLDER / FINGERPRINT
    partial = partial_path(output)
    try:
        if replaced.exists() and partial.exists() and not output.exists():
            replaced.rename(output)
        if fingerprint.is_file():
            for folder in (replaced, output / FOLDER / BLOCKS):
                if folder.exists():
                    shutil.rmtree(folder)
            fingerprint.unlink()
    except OSError as error:
        where = error.filename or output
        message = (
            f"cannot clean up {output}: {where}: {error.strerror or error}; check its "
            f"permissions, then start the run again"
        )
        raise DataError(message) from error

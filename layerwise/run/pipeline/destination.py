"""Output folder of a run: checked, and cleaned up after a killed run, before any work."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from layerwise.errors import DataError, UsageError

FOLDER = "layerwise"  # inside the output folder: all files that layerwise itself reads
FINGERPRINT = "fingerprint.json"
BLOCKS = "blocks"


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
        Replace a finished `output`.
    """

    output: Path | None = None
    resume: bool = True
    force: bool = False

    @classmethod
    def of(
        cls, output_dir: str | Path | None, *, resume: bool, force: bool
    ) -> "Destination":
        """Destination from the arguments of a run."""
        output = None if output_dir is None else Path(output_dir)
        return cls(output, resume, force)

    def check(self) -> None:
        """Refuse an output that exists or cannot be created."""
        if self.output is not None:
            check_output(self.output, force=self.force)


NOWHERE = Destination()


def partial_path(output: Path) -> Path:
    """Folder in which a run works until it has finished."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that exists or cannot be created, before any work is done.

    If an earlier run was killed while it finished, its renaming is completed first, or
    undone if the new folder did not have its name yet.
    """
    if output.name in ("", ".."):
        message = f"{output} does not name a new folder: choose another output"
        raise UsageError(message)
    settle(output)
    if output.exists() and not force:
        message = f"{output} exists; choose another output, or replace it with --force"
        raise UsageError(message)
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        message = f"cannot create {output}: {parent} is not writable; choose another output"
        raise DataError(message)


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

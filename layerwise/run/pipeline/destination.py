"""Output folder of a run: checked, and cleaned up after a killed run, before any work."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints.strict_json import read_object
from layerwise.run.pipeline.lock import locked

FOLDER = "layerwise"  # inside the output folder: all files that layerwise itself reads
FINGERPRINT = "fingerprint.json"
BLOCKS = "blocks"
PARTIAL = ".partial"  # end of the name of a folder in which a run works
LAYERS = "layers.jsonl"
GRAMS_KEY = "calibration_sha256"  # in the manifest of a gram folder
LONGEST_NAME = 255 - len(".replaced.")  # bytes of a name, on all common file systems
MOUNTS = Path("/proc/self/mountinfo")  # of Linux; its fifth column are mount points


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
        output = None if output_dir is None else named_folder(Path(output_dir))
        files = [path for value in inputs if (path := local_path(value)) is not None]
        return cls(output, resume, force, tuple(files))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Check the output, and keep other runs away from it inside the context.

        Raises
        ------
        UsageError
            The output exists, is in use by another run, or cannot have this name.
        DataError
            It cannot be created.
        """
        if self.output is None:
            yield
            return
        refuse_impossible_place(self.output)
        with _parents_of(self.output), locked(self.output):
            check_output(self.output, force=self.force, inputs=self.inputs)
            yield

    def refuse(self) -> None:
        """Refuse, as :meth:`held`, what can be refused without touching anything."""
        if self.output is not None:
            refuse_impossible_place(self.output)
            refuse_occupied(self.output, force=self.force, inputs=self.inputs)


NOWHERE = Destination()


def partial_path(output: Path) -> Path:
    """Folder in which a run works until it has finished."""
    return output.with_name(output.name + PARTIAL)


def local_path(value: Any) -> Path | None:
    """File or folder that an argument names, ``FILE.jsonl:field`` too; None if none."""
    if not isinstance(value, str | os.PathLike):
        return None
    name = os.fspath(value)
    paths = [Path(name), Path(name.rpartition(":")[0] or name)]
    try:
        return next((path for path in paths if path.exists()), None)
    except (OSError, ValueError):  # a text instead of a name: too long, or with a NUL
        return None


def named_folder(output: Path) -> Path:
    """Folder that a path names: ``~`` is the home, and a link is followed.

    Raises
    ------
    UsageError
        No folder can have this name.
    """
    try:
        output = output.expanduser()
        if "\0" in str(output) or len(os.fsencode(output.name)) > LONGEST_NAME:
            message = (
                f"the name {output.name[:40]!r} of the output is longer than "
                f"{LONGEST_NAME} bytes, or has a NUL in it: choose another output"
            )
            raise UsageError(message)
        str(output).encode()
        return output.resolve() if output.is_symlink() else output
    except UnicodeEncodeError:  # safetensors opens no such file
        message = f"the output {str(output)!r} is not a name in UTF-8: choose another"
        raise UsageError(message) from None
    except (OSError, RuntimeError) as error:
        message = f"the output {output} cannot be used: {error}; choose another output"
        raise UsageError(message) from error


def check_output(output: Path, *, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse an output that exists or cannot be created, before any work is done.

    If an earlier run was killed while it finished, its renaming is completed first, or
    undone if the new folder did not have its name yet.
    """
    refuse_impossible_place(output)
    settle(output)
    refuse_occupied(output, force=force, inputs=inputs)


def refuse_impossible_place(output: Path) -> None:
    """Refuse an output that cannot be created or renamed; nothing is touched.

    Raises
    ------
    UsageError
        It does not name a folder, or is a mount point.
    DataError
        Its parent is not a folder that can be written.
    """
    if output.name in ("", ".."):
        message = f"{output} does not name a new folder: choose another output"
        raise UsageError(message)
    if output.name.endswith(PARTIAL):
        message = (
            f"{output} has the name of an unfinished run ({PARTIAL}): choose another output"
        )
        raise UsageError(message)
    try:
        if is_mount_point(output):
            message = (
                f"{output} is a mount point, and a run ends by a renaming: choose a folder "
                f"inside it as output"
            )
            raise UsageError(message)
        parent = output.absolute().parent
        while not (parent.exists() or parent.is_symlink()):
            parent = parent.parent
        usable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    except OSError as error:
        message = f"cannot create {output}: {error.strerror}; choose another output"
        raise DataError(message) from error
    if not usable:
        message = f"cannot create {output}: {parent} is not writable; choose another output"
        raise DataError(message)


def is_mount_point(folder: Path) -> bool:
    """Whether a file system, or a folder of one, is mounted at a path."""
    if not folder.is_dir():
        return False
    if folder.is_mount():
        return True
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    name = str(folder.resolve()).replace("\\", "\\134").replace(" ", "\\040")
    return any(line.split()[4] == name for line in lines)


def refuse_occupied(output: Path, *, force: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output that is in the way; nothing is touched.

    An empty folder is taken. Only a folder that layerwise wrote is replaced, and never one
    that is, or holds, the working directory or an input of the run.

    Raises
    ------
    UsageError
        With the reason.
    """
    partial, replaced = partial_path(output), replaced_path(output)
    used = [path.resolve() for path in (*inputs, *_working_folder())]
    for folder in (output, partial, replaced):
        for path in used:
            if folder.exists() and path.is_relative_to(folder.resolve()):
                message = (
                    f"{folder} is or holds {path}, which is in use: choose another output"
                )
                raise UsageError(message)
    for folder in (partial, replaced):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            message = (
                f"{folder} is not an unfinished run of layerwise; remove it or choose "
                f"another output"
            )
            raise UsageError(message)
    if not (output.exists() or output.is_symlink()) or _is_empty(output):
        return
    if not force:
        message = (
            f"{output} exists; choose another output, or replace it with --force "
            f"(force=True)"
        )
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
    if (folder / FOLDER / LAYERS).is_file() or _is_empty(folder):
        return True
    try:
        return GRAMS_KEY in read_object(folder / "manifest.json")
    except DataError:
        return False


def _working_folder() -> list[Path]:
    with suppress(FileNotFoundError):  # it was removed
        return [Path.cwd()]
    return []


def _is_empty(folder: Path) -> bool:
    try:
        return folder.is_dir() and not any(folder.iterdir())
    except OSError:  # it cannot be listed
        return False


@contextmanager
def _parents_of(output: Path) -> Iterator[None]:
    """Create the parents of an output; remove those that are empty at the end."""
    folder = output.absolute().parent
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"cannot create {folder}: {error.strerror}; choose another output"
        raise DataError(message) from error
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


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

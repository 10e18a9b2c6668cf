"""Atomic files: a reader sees the old content or the new, never a part of it."""

import os
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import DataError
from layerwise.run.checkpoints.atomic import atomic_write, remove_temporaries


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if step == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    if step == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    data = fail if step == "write" else b"new content"
    match = "No space left on device; free" if step == "write" else "11 bytes needed"
    with pytest.raises(DataError, match=match) as caught:
        atomic_write(path, data)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def interrupt(stream: Any) -> None:
        stream.write(b"ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, interrupt)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        folder = os.fstat(descriptor).st_ino == tmp_path.stat().st_ino
        events.append("flush folder" if folder else "flush file")
        assert folder or os.fstat(descriptor).st_size == len(b"content")
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        assert self.read_bytes() == b"content"
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    atomic_write(tmp_path / "file", lambda stream: stream.write(b"content"))
    assert events == ["flush file", "rename", "flush folder"]


def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    for folder in (tmp_path, tmp_path / "below"):
        (folder / ".file.123.tmp").write_bytes(b"half")
        (folder / "kept.tmp").write_bytes(b"not ours")
    remove_temporaries(tmp_path)
    kept = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert kept == ["kept.tmp", "kept.tmp"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_what_is_not_a_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """A device neither, such as /dev/null: a link stands for it here."""
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(os.devnull)
    before = path.lstat()
    with pytest.raises(DataError, match="it is not a file; choose another name"):
        atomic_write(path, b"figures")
    after = path.lstat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert list(tmp_path.iterdir()) == [path]

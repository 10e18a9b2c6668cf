"""Disks that fail: an error that says where and how much, old data untouched, and a sequel.

A fault is injected at the n-th call, until a run is not hit any more: for every n where
something is written, for every fifth where something is read.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints import shard, storage
from layerwise.run.prune import prune_model
from tests.support.folders import files_of, without_time
from tests.support.models import differing, random_tokens, save_checkpoint, tiny_model

BLOCKS = 2


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("opt", layers=BLOCKS, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("disk") / "opt"
    return save_checkpoint(folder, model, tokenizer=False, max_shard_size="9KB")


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    prune(source, out)
    return out


def prune(source: Path, out: Path, **options: Any) -> None:
    prune_model(
        source,
        "magnitude",
        0.5,
        calibration=random_tokens(2, 8),
        n_sequences=2,
        sequence_length=8,
        error_correction="sequential",
        activations="disk",
        output_dir=out,
        **options,
    )


class Fault:
    """Makes a function fail at its n-th call, and remembers whether it did."""

    def __init__(self, number: int, code: int) -> None:
        self.hit = False
        self._left, self._code = number, code

    def on(
        self,
        function: Callable[..., Any],
        meant: Callable[..., bool] = lambda *_, **__: True,
    ) -> Callable[..., Any]:
        """The function, with this fault; calls that are not meant do not count."""

        def failing(*arguments: Any, **options: Any) -> Any:
            if meant(*arguments, **options):
                self._left -= 1
                if self._left == 0:
                    self.hit = True
                    raise OSError(self._code, os.strerror(self._code))
            return function(*arguments, **options)

        return failing


def reads(path: Path, mode: str = "r", *_: Any, **__: Any) -> bool:
    return mode == "rb"


def break_writes(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Flushes of files and folders, and space for hidden states."""
    patch.setattr(os, "fsync", fault.on(os.fsync))
    patch.setattr(os, "posix_fallocate", fault.on(os.posix_fallocate))


def break_reads(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    """Files that are opened to be read, by us or by safetensors."""
    patch.setattr(Path, "open", fault.on(Path.open, reads))
    for module in (storage, shard):
        patch.setattr(module, "safe_open", fault.on(module.safe_open))


def break_folders(patch: pytest.MonkeyPatch, fault: Fault) -> None:
    """What makes, renames and removes folders."""
    patch.setattr(Path, "mkdir", fault.on(Path.mkdir))
    patch.setattr(Path, "rename", fault.on(Path.rename))
    patch.setattr(shutil, "rmtree", fault.on(shutil.rmtree))


FAULTS: Mapping[str, tuple[Callable[..., None], int, str, int, int]] = {
    # what fails, how, what the error says, step of n, how many n there are at least
    "disk full": (
        break_writes,
        errno.ENOSPC,
        r"cannot .*/out.*\(\d+ bytes needed\): No space",
        1,
        30,
    ),
    "unreadable": (break_reads, errno.EIO, r"/(opt|out\.partial)/.* Input/output", 5, 60),
    "forbidden": (
        break_folders,
        errno.EACCES,
        r"cannot (create|.*/out).*Permission denied",
        1,
        4,
    ),
}


@pytest.mark.parametrize(
    ("breaks", "code", "match", "step", "least"), FAULTS.values(), ids=FAULTS
)
def test_fault_at_any_call(
    breaks: Callable[..., None],
    code: int,
    match: str,
    step: int,
    least: int,
    source: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An older output is intact until the new one has its name."""
    pristine, expected = files_of(source), files_of(whole)
    number, hit = 0, True
    while hit:
        number += step
        parent = tmp_path / str(number)
        out, fault = parent / "out", Fault(number, code)
        (out / "layerwise").mkdir(parents=True)
        (out / "layerwise" / "layers.jsonl").write_text("")  # an output of layerwise
        (out / "old.txt").write_text("precious")
        older = files_of(out)
        failure: DataError | None = None
        with monkeypatch.context() as patch:
            breaks(patch, fault)
            try:
                prune(source, out, force=True)
            except DataError as error:
                failure = error
        hit, said = fault.hit, str(failure)
        assert getattr(failure, "exit_code", None) == (6 if hit else None)
        assert (re.search(match, said) is not None) == hit, f"call {number}: {said}"
        assert "\n" not in said
        if not (out / "config.json").exists():
            assert files_of(out) == older, f"call {number}"
            prune(source, out, force=True)
        elif hit:  # finished, but not tidy
            with pytest.raises(UsageError, match="exists; choose another output"):
                prune(source, out)
        assert not differing(files_of(out), expected), f"call {number}"
        assert without_time(out) == without_time(whole)
        assert [path.name for path in parent.iterdir()] == ["out"]
        assert files_of(source) == pristine
        shutil.rmtree(parent)
    assert number > least

"""Interrupted runs: what is finished is kept, and the end is byte-identical."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.errors import DataError, SolveError, UsageError
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import PrunedBlock
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.run.prune import prune_model
from layerwise.solve import solve
from tests.support.folders import files_of, without_time
from tests.support.models import (
    differing,
    random_tokens,
    save_checkpoint,
    tiny_model,
    tiny_text,
)

BLOCKS = 3
TEXT = [tiny_text()]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("qwen3", layers=BLOCKS, dtype=torch.bfloat16)
    return save_checkpoint(tmp_path_factory.mktemp("models") / "qwen3", model)


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class KillAt:
    """Callback that ends the run after a layer, and counts the layers it sees."""

    def __init__(self, name: str | None = None) -> None:
        self.name, self.seen = name, list[str]()

    def on_start(self, n_layers: int) -> None:
        assert n_layers == 7 * BLOCKS

    def on_layer(self, record: LayerRecord) -> None:
        self.seen.append(record.name)
        if record.name == self.name:
            raise Killed

    def on_finish(self, report: Any) -> None:
        self.seen.append("finish")


def prune(source: Path | Any, out: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "method": "sparsegpt",
        "sparsity": 0.5,
        "calibration": TEXT,
        "n_sequences": 6,
        "sequence_length": 12,
        "output_dir": out,
    }
    return prune_model(source, **{**arguments, **options})


def interrupted(source: Path, out: Path, **options: Any) -> Path:
    """Return the partial folder of a run that was killed in its second block."""
    with pytest.raises(Killed):
        prune(source, out, callbacks=[KillAt("model.layers.1.mlp.up_proj")], **options)
    assert not out.exists()
    partial = out.with_name(out.name + ".partial")
    assert partial.is_dir()
    return partial


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_resumed_run_ends_byte_identical(source: Path, tmp_path: Path, mode: str) -> None:
    prune(source, tmp_path / "whole", error_correction=mode)
    out = tmp_path / "out"
    partial = interrupted(source, out, error_correction=mode)
    kept = without_time(partial)
    assert {record.name.split(".")[2] for record in kept} == {"0"}
    listener = KillAt()
    report = prune(source, out, error_correction=mode, callbacks=[listener])
    assert not partial.exists()
    assert not differing(files_of(out), files_of(tmp_path / "whole"))
    assert without_time(out) == without_time(tmp_path / "whole")
    assert list(report.masks) == [f"{record.name}.weight" for record in report.records]
    assert listener.seen == [*(record.name for record in report.records), "finish"]
    assert without_time(out)[: len(kept)] == kept


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
def test_finished_blocks_are_not_solved_again(
    source: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path / "out", error_correction=mode)
    solved: list[str] = []
    original = ZeroWeights.prune_block

    def counting(self: ZeroWeights, task: Any, inputs: Any, *others: Any) -> PrunedBlock:
        solved.append(inputs.name)
        return original(self, task, inputs, *others)

    monkeypatch.setattr(ZeroWeights, "prune_block", counting)
    prune(source, tmp_path / "out", error_correction=mode)
    assert solved == ["model.layers.1", "model.layers.2"]


def test_failure_of_the_solver_keeps_what_is_finished(source: Path, tmp_path: Path) -> None:
    class Failing:
        fingerprint = "the same, broken or not"
        calls = 0

        def solve(self, problem: Any) -> Any:
            solution = solve(problem, "magnitude")
            self.calls += 1
            if self.calls == 9:
                solution.weight.fill_(float("nan"))
            return solution

    solver = Failing()
    with pytest.raises(SolveError, match=r"^model\.layers\.1\.self_attn\.k_proj: Failing"):
        prune(source, tmp_path / "out", method=solver)
    assert (tmp_path / "out.partial").is_dir()
    prune(source, tmp_path / "out", method=solver)
    assert (tmp_path / "out" / "config.json").is_file()


def test_killed_at_any_write(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends at the n-th file that gets its name, for every n, and is resumed."""
    settings = {
        "method": "magnitude",
        "error_correction": "none",
        "calibration": random_tokens(6, 12),
    }
    prune(source, tmp_path / "whole", **settings)
    expected = files_of(tmp_path / "whole")
    left = [0]

    def dying(method: Callable[..., Path]) -> Callable[..., Path]:
        def move(path: Path, target: Path) -> Path:
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return method(path, target)

        return move

    step, finished = 0, False
    while not finished:
        step += 1
        out = tmp_path / f"out{step}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", dying(Path.replace))
            patch.setattr(Path, "rename", dying(Path.rename))
            left[0] = step
            try:
                prune(source, out, **settings)
                finished = True
            except Killed:
                assert not out.exists()
        prune(source, out, force=finished, **settings)
        assert not differing(files_of(out), expected), f"write {step}"
        assert not out.with_name(out.name + ".partial").exists()
    assert step > 2 * BLOCKS + 8  # blocks and their log, shard, side files, ours


def test_leftovers_of_a_killed_writer_do_not_reach_the_output(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    partial = interrupted(source, out)
    (partial / "additional_chat_templates").mkdir()
    for folder in ("", "layerwise", "layerwise/blocks", "additional_chat_templates"):
        (partial / folder / ".model.safetensors.123.tmp").write_bytes(b"half")
    prune(source, out)
    assert not list(out.rglob("*.tmp"))


def test_killed_while_the_folder_was_made(source: Path, tmp_path: Path) -> None:
    ours = tmp_path / "out.partial" / "layerwise"
    (ours / "blocks").mkdir(parents=True)
    (ours / ".fingerprint.json.123.tmp").write_bytes(b"{")
    prune(source, tmp_path / "out", method="magnitude")
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_nothing_is_left_of_a_run_without_a_finished_block(
    source: Path, tmp_path: Path
) -> None:
    callbacks = [KillAt("model.layers.0.mlp.up_proj")]
    with pytest.raises(Killed):
        prune(source, tmp_path / "out", callbacks=callbacks)
    assert list(tmp_path.iterdir()) == []


# --- what is refused ---------------------------------------------------------------------

OTHERS: Mapping[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 1}, "calibration, seed"),
    "sparsity": ({"sparsity": 0.6}, "sparsity"),
    "pattern": ({"sparsity": "2:4"}, "sparsity"),
    "method": ({"method": "wanda"}, "method"),
    "options": ({"options": {"block_size": 8}}, "options"),
    "damping": ({"damping": 0.1}, "damping"),
    "text": ({"calibration": [tiny_text(seed=3)]}, "calibration"),
    "windows": ({"n_sequences": 5}, "calibration, n_sequences"),
    "length": ({"sequence_length": 11}, "calibration, sequence_length"),
    "mode": ({"error_correction": "full"}, "error_correction"),
    "targets": ({"targets": "re:.*_proj"}, "targets"),
    "ignore": ({"ignore": "re:.*q_proj"}, "ignore"),
}


@pytest.mark.parametrize(("options", "names"), OTHERS.values(), ids=list(OTHERS))
def test_another_run_is_refused(
    source: Path, tmp_path: Path, options: dict[str, Any], names: str
) -> None:
    partial = interrupted(source, tmp_path / "out")
    before = files_of(partial)
    with pytest.raises(UsageError, match=f"another {names}; remove it") as caught:
        prune(source, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert files_of(partial) == before


def test_other_weights_are_refused(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    model = tiny_model("qwen3", layers=BLOCKS, dtype=torch.bfloat16, seed=1)
    other = save_checkpoint(tmp_path / "other", model)
    with pytest.raises(UsageError, match="another weights"):
        prune(other, tmp_path / "out")


def test_another_number_of_threads_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(source, tmp_path / "out")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    with pytest.raises(UsageError, match="another threads"):
        prune(source, tmp_path / "out")


def test_settings_of_a_users_own_solver_count(source: Path, tmp_path: Path) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Mine:
        strength: float
        hook: Callable[[], None] | None = None  # of no type that can be written

        def solve(self, problem: Any) -> Any:
            return solve(problem, "magnitude")

    def hook() -> None: ...

    interrupted(source, tmp_path / "out", method=Mine(0.5, hook))
    for other in (Mine(0.25, hook), Mine(0.5), Mine(0.5, lambda: [].clear())):
        with pytest.raises(UsageError, match=r"another .*state or code of the solver"):
            prune(source, tmp_path / "out", method=other)
    prune(source, tmp_path / "out", method=Mine(0.5, hook))


def test_starting_over_on_request(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(source, out)
    prune(source, out, seed=1, resume=False)
    prune(source, tmp_path / "whole", seed=1)
    assert not differing(files_of(out), files_of(tmp_path / "whole"))


@pytest.mark.parametrize("resume", [True, False])
def test_a_strangers_folder_is_refused(source: Path, tmp_path: Path, resume: bool) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").write_text("precious")
    (tmp_path / "out.partial" / ".notes.tmp").write_text("precious")
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match="is not an unfinished run of layerwise"):
        prune(source, tmp_path / "out", resume=resume)
    assert files_of(tmp_path) == before


def test_a_strangers_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("precious")
    with pytest.raises(UsageError, match="is not an unfinished run of layerwise"):
        prune(source, tmp_path / "out")
    assert (tmp_path / "out.partial").read_text() == "precious"


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_output_without_a_name_is_refused(source: Path, name: str) -> None:
    with pytest.raises(UsageError, match="does not name a new folder"):
        prune(source, Path(name), force=True)


# --- an output that exists ---------------------------------------------------------------


def test_existing_output_is_refused_and_intact(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(source, out)
    before = files_of(tmp_path)
    with pytest.raises(UsageError, match="exists; choose another output"):
        prune(source, out, seed=1)
    assert files_of(tmp_path) == before


def test_existing_output_is_replaced_on_request(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prune(source, out)
    (out / "stale.txt").write_text("of the old run")
    before = files_of(out)
    callbacks = [KillAt("model.layers.1.mlp.up_proj")]
    with pytest.raises(Killed):
        prune(source, out, seed=1, force=True, callbacks=callbacks)
    assert files_of(out) == before
    prune(source, out, seed=1, force=True)
    prune(source, tmp_path / "whole", seed=1)
    assert not differing(files_of(out), files_of(tmp_path / "whole"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_failed_replacement_leaves_the_old_output(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(source, out)
    before, rename = files_of(out), Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "out.partial":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(DataError, match="No space left on device"):
            prune(source, out, seed=1, force=True)
    assert files_of(out) == before
    prune(source, out, seed=1, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_stale_copy_of_a_replaced_output_is_no_obstacle(
    source: Path, tmp_path: Path
) -> None:
    prune(source, tmp_path / "out", method="magnitude")
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "config.json").write_text("{}")
    prune(source, tmp_path / "out", method="magnitude", seed=1, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_replaced_output_gets_its_name_back(source: Path, tmp_path: Path) -> None:
    """A run was killed after it took the name and before it gave it to the new folder."""
    out = tmp_path / "out"
    prune(source, out, method="magnitude")
    before = files_of(out)
    interrupted(source, tmp_path / "new", seed=1)
    (tmp_path / "new.partial").rename(tmp_path / "out.partial")
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(UsageError, match="exists; choose another output"):
        prune(source, out, seed=1)
    assert files_of(out) == before
    prune(source, out, seed=1, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_end_that_was_killed_is_made_up_for(
    source: Path, tmp_path: Path, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished, but the files that a resumed run would need still exist."""

    def die(path: Path, **options: Any) -> None:
        raise Killed

    out = tmp_path / "out"
    prune(source, tmp_path / "whole", method="magnitude")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(Killed):
            prune(source, out, method="magnitude")
    assert (out / "layerwise" / "fingerprint.json").exists()
    if force:
        prune(source, out, method="magnitude", force=True)
    else:
        with pytest.raises(UsageError, match="exists; choose another output"):
            prune(source, out, method="magnitude")
    assert files_of(out) == files_of(tmp_path / "whole")

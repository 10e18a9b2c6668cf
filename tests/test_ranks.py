"""Several ranks give the masks of one process, and end together."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import layerwise
from layerwise.errors import UsageError
from layerwise.run.outputs.output import Manifest
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline.journal import read_layers, read_masks
from layerwise.run.workers.ranks import ALONE, RankEnvironment, owners
from tests.support.models import save_checkpoint, tiny_model
from tests.support.rank_runs import CRASH
from tests.support.tolerances import RANKS, RANKS_ERROR

ROOT = Path(layerwise.__file__).parents[1]
PROMPT = (
    15.0  # seconds in which all ranks of a run that fails have ended, on a busy machine
)
WORKER, USAGE = 7, 2  # exit codes

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama", tiny_model("llama"))


@pytest.fixture(scope="module")
def _process() -> Iterator["subprocess.Popen[str]"]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.rank_runs"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def run(_process: "subprocess.Popen[str]", tmp_path: Path) -> Run:
    """Run a job on ranks with these arguments each; codes, answers and seconds."""

    def on_ranks(job: str, *arguments: dict[str, Any]) -> dict[str, Any]:
        request = {
            "port": free_port(),
            "folder": str(tmp_path),
            "ranks": [{"job": job, "arguments": each} for each in arguments],
        }
        assert _process.stdin is not None
        assert _process.stdout is not None
        _process.stdin.write(json.dumps(request) + "\n")
        _process.stdin.flush()
        return dict(json.loads(_process.stdout.readline()))

    return on_ranks


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def assert_same_result(found: Path, expected: Path) -> None:
    """Masks bit by bit, errors but for rounding."""
    masks, others = read_masks(found), read_masks(expected)
    assert list(masks) == list(others)
    assert all(torch.equal(masks[name], others[name]) for name in masks)
    for ours, theirs in zip(read_layers(found), read_layers(expected), strict=True):
        assert (ours.name, ours.n_tokens) == (theirs.name, theirs.n_tokens)
        assert ours.relative_error == pytest.approx(theirs.relative_error, rel=RANKS_ERROR)


@pytest.mark.parametrize("mode", ["sequential", "full", "block"])
def test_two_ranks_write_the_folder_of_one(
    run: Run, source: Path, tmp_path: Path, mode: str
) -> None:
    arguments = {"source": str(source), "error_correction": mode}
    alone = run("prune", arguments | {"output_dir": str(tmp_path / "alone")})
    shared = arguments | {"output_dir": str(tmp_path / "out")}
    done = run("prune", shared, shared)
    assert alone["codes"] + done["codes"] == [0, 0, 0], done
    assert_same_result(tmp_path / "out", tmp_path / "alone")
    assert all(check.holds for check in verify(tmp_path / "out"))
    first, second = done["answers"]
    assert (first["layers"], first["finished"]) == (14, 1)
    assert (second["layers"], second["finished"]) == (0, 0)
    assert first["masks"] == second["masks"]
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out"]
    manifest = Manifest.read(tmp_path / "out")
    assert manifest.pruned == Manifest.read(tmp_path / "alone").pruned


def test_models_in_memory_are_the_same_on_every_rank(run: Run) -> None:
    done = run("prune", *[{"error_correction": "full"}] * 3)
    alone = run("prune", {"error_correction": "full"})
    assert done["codes"] == [0, 0, 0], done
    assert len({json.dumps(a["masks"]) for a in done["answers"] + alone["answers"]}) == 1
    assert len({answer["weights"] for answer in done["answers"]}) == 1


@pytest.mark.parametrize(("pair", "rows"), [(False, [3]), (True, [1, 2]), (True, [9])])
def test_moments_of_two_ranks_are_those_of_one(
    run: Run, pair: bool, rows: list[int]
) -> None:
    """Drifts by few rows come from products, by many from a gram."""
    arguments = {"pair": pair, "rows": rows}
    done = run("moments", arguments, arguments)
    assert done["codes"] == [0, 0], done
    expected = run("moments", arguments, arguments)["answers"][0]
    single = run("moments", arguments)["answers"][0]
    assert done["answers"] == [expected, expected]  # the same bits on both, every time
    assert expected["n_tokens"] == single["n_tokens"] == 40
    assert (expected["cross_gram"] is None) == (not pair)
    for name, values in single.items():
        if values is None:
            assert expected[name] is None
            continue
        there, here = torch.tensor(expected[name]), torch.tensor(values)
        torch.testing.assert_close(there.double(), here.double(), rtol=RANKS, atol=RANKS)


def test_what_ranks_tell_add_and_copy(run: Run) -> None:
    done = run("words", {}, {})
    assert done["codes"] == [0, 0], done
    expected = [[f"word {number}", 3.0, [True, True], 1.5] for number in range(2)]
    assert [answer["found"] for answer in done["answers"]] == [expected, expected]


def test_a_rank_that_fails_ends_all_and_the_run_is_continued(
    run: Run, source: Path, tmp_path: Path
) -> None:
    out = {"source": str(source), "error_correction": "sequential"}
    out["output_dir"] = str(tmp_path / "out")
    fails = out | {"method": {"rank": 1, "after": 5}}
    stopped = run("prune", fails, fails)
    assert stopped["codes"] == [WORKER, CRASH], stopped
    message = stopped["answers"][0]["error"]
    assert message == "WorkerError: rank 1 failed: out of order"
    assert stopped["seconds"] < PROMPT
    blocks = tmp_path / "out.partial" / "layerwise" / "blocks"
    assert [path.name[:5] for path in blocks.glob("*.safetensors")] == ["00000"]
    kept = next(blocks.glob("00000-*")).stat().st_mtime_ns

    goes_on = out | {"method": {"rank": 1, "after": 100}}
    single = run("prune", goes_on)
    assert single["codes"] == [USAGE]
    assert "an unfinished run with another ranks" in single["answers"][0]["error"]
    assert next(blocks.glob("00000-*")).stat().st_mtime_ns == kept
    done = run("prune", goes_on, goes_on)
    assert done["codes"] == [0, 0], done
    assert done["answers"][0]["layers"] == 14
    # seven matrices of the first block came from the journal: the method has the rest
    run("prune", goes_on | {"output_dir": str(tmp_path / "alone")})
    assert_same_result(tmp_path / "out", tmp_path / "alone")


def test_a_rank_that_dies_is_not_waited_for(run: Run) -> None:
    """Rank 0 keeps the store here; torchrun keeps one itself, and ends the others."""
    done = run("stalls", {"dies": 0}, {"dies": 0})
    assert done["codes"] == [CRASH, WORKER]
    assert "the store of the ranks cannot be reached" in done["answers"][1]["error"]
    assert done["seconds"] < PROMPT


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"error_correction": "block", "workers": 2}, "leave out --workers and --ray"),
    ({"method": "gblm"}, "gblm needs gradients of the whole model"),
    (
        {"method": "columns", "pattern": "columns"},
        "channels are chosen and cut",
    ),
    ({"n_sequences": 1}, "1 calibration sequences are fewer than the 2 ranks"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_ranks_cannot_do_is_refused(
    run: Run, source: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    arguments = {"source": str(source), "output_dir": str(tmp_path / "out"), **arguments}
    done = run("prune", arguments, arguments)
    # the rank that is second to see it may hear of the first
    assert set(done["codes"]) <= {USAGE, WORKER}
    assert USAGE in done["codes"]
    assert all(message in answer["error"] for answer in done["answers"]), done
    assert not list(tmp_path.glob("out*"))


def test_ranks_that_would_do_different_things_are_refused(
    run: Run, source: Path, tmp_path: Path
) -> None:
    arguments = {"source": str(source), "output_dir": str(tmp_path / "out")}
    done = run("prune", arguments, arguments | {"damping": 0.02})
    assert done["codes"] == [WORKER, USAGE], done
    assert "rank 1 has another damping than rank 0" in done["answers"][1]["error"]
    assert not list(tmp_path.glob("out*"))


def test_torchrun_runs_the_command_line(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven " * 60, encoding="utf-8")
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-addr", "127.0.0.1", "--master-port", str(free_port())),
            *("-m", "layerwise", "prune", str(source), "--method", "wanda"),
            *("--sparsity", "2:4", "--calibration", str(text), "--output", str(out)),
            *("--n-sequences", "4", "--sequence-length", "12"),
            *("--error-correction", "sequential", "--device", "cpu"),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pruning 14 layers") == 1
    with safe_open(out / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("model.layers.1.mlp.down_proj.weight")
    zeros = (weight == 0).reshape(len(weight), -1, 4).sum(dim=2)
    assert bool((zeros >= 2).all())


def test_owners_share_the_costs() -> None:
    assert owners([], 2) == []
    assert owners([1, 1, 1], 1) == [0, 0, 0]
    assert owners([4, 4, 4, 4, 11, 11, 11], 2) == [1, 1, 1, 0, 0, 1, 0]
    assert owners([3, 5], 4) == [1, 0]


def test_the_environment_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert RankEnvironment.read() == RankEnvironment()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert RankEnvironment.read() == RankEnvironment()
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UsageError, match="RANK, MASTER_ADDR, MASTER_PORT is not set"):
        RankEnvironment.read()
    for name, value in {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1234",
    }.items():
        monkeypatch.setenv(name, value)
    assert RankEnvironment.read() == RankEnvironment(5, 8, 1, 4)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UsageError, match="WORLD_SIZE is 'many': it must be a number"):
        RankEnvironment.read()


@pytest.mark.parametrize(
    ("gpus", "device", "own"),
    [
        (4, "auto", 1),
        (4, "cuda", 1),
        (4, "cpu", None),
        (4, "cuda:2", None),
        (3, "auto", None),
        (0, "auto", None),
    ],
)
def test_a_rank_takes_the_gpu_of_its_number(
    monkeypatch: pytest.MonkeyPatch, gpus: int, device: str, own: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert RankEnvironment(5, 8, 1, 4).own_gpu(device) == own


def test_a_process_alone_shares_nothing() -> None:
    total = torch.ones(2)
    ALONE.barrier()
    ALONE.all_reduce([total])
    ALONE.broadcast([total], 0)
    assert ALONE.broadcast_text("key", "text") == "text"
    assert torch.equal(total, torch.ones(2))
    assert (ALONE.first, ALONE.are_several) == (True, False)

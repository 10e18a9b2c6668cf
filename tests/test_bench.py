"""Stages of a run: nothing is counted twice, work is what a hand count says."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from layerwise.adapters import get_adapter
from layerwise.errors import UsageError
from layerwise.reports.tables import print_bench
from layerwise.run.prune import prune_model
from layerwise.run.stopwatch import Stopwatch, timed
from layerwise.timing import shapes
from layerwise.timing.bench import REST, STAGES, bench
from layerwise.timing.floor import (
    Machine,
    Work,
    forward_work,
    grading_work,
    gram_work,
    run_work,
)
from layerwise.timing.shapes import SHAPES, piece_size, random_model
from tests.support.models import (
    INNER,
    SHARD,
    WIDTH,
    random_tokens,
    save_checkpoint,
    tiny_model,
)

SETTINGS: dict[str, Any] = {"n_sequences": 2, "sequence_length": 8}
TOKENS, LENGTH = 16, 8
BLOCK = 3 * WIDTH**2 + 3 * WIDTH * INNER  # k and v have half the heads


# --- stopwatch ------------------------------------------------------------------------


def test_stages_inside_stages_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    with Stopwatch() as watch:
        pass_time(1)  # outside of all stages
        with timed("forward"):
            pass_time(2)
            with timed("gram"):
                pass_time(4)
            pass_time(8)
        with timed("gram"):
            pass_time(16)
    assert watch.seconds == {"forward": 10, "gram": 20}


def test_an_error_ends_a_stage() -> None:
    with Stopwatch() as watch:
        with pytest.raises(ValueError, match="inside"), timed("solve"):
            raise ValueError("inside")  # noqa: EM101
        with timed("write"):
            pass
    assert list(watch.seconds) == ["solve", "write"]
    assert not watch._open


def test_nothing_is_measured_without_a_stopwatch() -> None:
    with Stopwatch() as watch:
        pass
    with timed("solve"):
        pass
    assert not watch.seconds


SOME_METHODS = {"gradients", "survey", "certify"}  # what wanda does without


@pytest.mark.parametrize("mode", ["none", "sequential", "block", "full"])
def test_a_stopwatch_changes_nothing(mode: Any, tmp_path: Path) -> None:
    """Stages are those of the list, and the bytes are those of an unwatched run."""
    source = save_checkpoint(tmp_path / "source", tiny_model("llama"))
    arguments: dict[str, Any] = {"calibration": random_tokens(2, 8), **SETTINGS}
    arguments |= {"error_correction": mode}
    prune_model(source, "wanda", 0.5, output_dir=tmp_path / "plain", **arguments)
    with Stopwatch() as watch:
        prune_model(source, "wanda", 0.5, output_dir=tmp_path / "timed", **arguments)
    plain, timed = (load_file(tmp_path / name / SHARD) for name in ("plain", "timed"))
    assert all(torch.equal(plain[name], timed[name]) for name in plain)
    fingerprint = "layerwise/fingerprint.json"
    one, other = (tmp_path / name / fingerprint for name in ("plain", "timed"))
    assert one.is_file() == other.is_file()
    if one.is_file():
        assert one.read_bytes() == other.read_bytes()
    assert set(watch.seconds) == set(STAGES) - SOME_METHODS
    assert min(watch.seconds.values()) > 0


# --- counts ---------------------------------------------------------------------------


def test_forward_work_by_hand() -> None:
    model = tiny_model("llama")
    block = next(iter(get_adapter("llama").blocks_of(model).values()))
    work = forward_work(block, model.config, TOKENS, LENGTH)
    attention = 2 * (2 * TOKENS * LENGTH * WIDTH) / 2
    assert work.flops == {torch.float32: 2 * TOKENS * BLOCK + attention}
    assert work.bytes == 4 * (BLOCK + 2 * WIDTH)  # and two norms


def test_gram_and_grading_by_hand() -> None:
    assert gram_work([3], [False], 5).flops == {torch.float32: 5 * (3 * 4)}
    assert gram_work([3], [True], 5).flops == {torch.float32: 5 * (3 * 4) + 2 * 5 * 9}
    assert gram_work([3], [False], 5, torch.bfloat16).flops == {torch.bfloat16: 60}
    assert grading_work([(2, 3), (4, 5)]).flops == {torch.float64: 2 * 2 * 9 + 2 * 4 * 25}


@pytest.mark.parametrize(
    ("mode", "whole", "inside", "cross"),
    [
        ("none", 1, 1, 0),
        ("sequential", 1, 2, 0),
        ("block", 1, 3, 6),
        ("full", 2, 2, 7),
    ],
)
def test_work_of_a_run(mode: Any, whole: int, inside: int, cross: int) -> None:
    """Two blocks of four grams; the first of them needs no cross-gram, `cross` do."""
    model = tiny_model("llama")
    adapter = get_adapter("llama")
    report = prune_model(model, "wanda", 0.5, calibration=random_tokens(2, 8), **SETTINGS)
    shapes = {record.name: record.shape for record in report.records}
    work = run_work(model, adapter, shapes, mode, TOKENS, LENGTH, torch.device("cpu"))
    block = next(iter(adapter.blocks_of(model).values()))
    once = forward_work(block, model.config, TOKENS, LENGTH)
    last = 2 * TOKENS * WIDTH * INNER  # outputs that nothing reads
    passes = (whole + inside) * once.total_flops - inside * last
    assert work["forward"].total_flops == passes
    grams = 2 * TOKENS * (3 * WIDTH * (WIDTH + 1) + INNER * (INNER + 1))
    crosses = (cross - 2 * bool(cross)) * 2 * TOKENS * WIDTH**2
    crosses += 2 * bool(cross) * 2 * TOKENS * INNER**2
    assert work["gram"].total_flops == grams + crosses
    linears = 2 * 2 * (WIDTH + WIDTH // 2 + WIDTH // 2 + WIDTH + 2 * INNER) * WIDTH**2
    assert work["solve"].total_flops == linears + 2 * 2 * WIDTH * INNER**2


def test_floor_is_work_over_rate() -> None:
    machine = Machine(torch.device("cpu"))
    machine.gemm_rates[torch.float32] = 10.0
    machine.gemm_rates[torch.float64] = 5.0
    machine._copy_rate = 2.0
    work = Work({torch.float32: 20.0}, 6.0) + Work({torch.float64: 10.0}, 1.0)
    assert work.total_flops == 30
    assert machine.floor(work) == 4.0  # two seconds for each type
    assert machine.floor(Work(bytes=10.0)) == 5.0
    assert machine.floor(Work()) == 0


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerwise.timing.floor.GEMM_SIZE", {"cpu": 16})
    monkeypatch.setattr("layerwise.timing.floor.COPY_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr("layerwise.timing.floor.LEAST_SECONDS", 0.0)
    machine = Machine(torch.device("cpu"))
    assert machine.gemm_rate(torch.float64) > 0
    assert machine.copy_rate > 0
    assert list(machine.gemm_rates) == [torch.float64]


# --- shapes ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_have_the_shape_of_the_model(shape: str) -> None:
    hidden = {
        "opt-125m": 768,
        "opt-1.3b": 2048,
        "llama-7b": 4096,
        "llama-3-8b": 4096,
        "mamba-130m": 768,
    }
    config = SHAPES[shape]()
    assert config.hidden_size == hidden.get(shape, config.hidden_size)
    assert 1 <= piece_size(config, torch.float32) <= config.num_hidden_layers


def test_large_models_are_pruned_in_pieces() -> None:
    """A block of LLaMA-7B takes 0.8 GB in float32, so that two of them fit."""
    assert piece_size(SHAPES["llama-7b"](), torch.float32) == 2
    assert piece_size(SHAPES["opt-125m"](), torch.float32) == 12


def test_random_weights_have_a_decaying_spectrum() -> None:
    config = SHAPES["demo-llama"]()
    one, same, other = (random_model(config, 1, torch.float32, seed) for seed in (0, 0, 1))
    name = "model.layers.0.mlp.gate_proj.weight"
    weight = one.get_parameter(name)
    assert torch.equal(weight, same.get_parameter(name))
    assert not torch.equal(weight, other.get_parameter(name))
    values = torch.linalg.svdvals(weight.detach())
    fresh = torch.linalg.svdvals(torch.randn(weight.shape) / weight.shape[1] ** 0.5)
    assert values[0] / values.median() > 2 * fresh[0] / fresh.median()
    assert len(one.model.layers) == 1


# --- the command ----------------------------------------------------------------------


def test_bench_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("opt"))
    capsys.readouterr()
    found = bench(source, n_sequences=2, device="cpu")
    rows = {row.stage: row for row in found.stages}
    assert list(rows) == [s for s in (*STAGES, REST) if s not in SOME_METHODS]
    assert all(row.seconds > 0 for row in found.stages)
    assert rows["load"].work.bytes == (source / SHARD).stat().st_size
    assert rows["write"].work.bytes == (source / SHARD).stat().st_size
    for name in ("load", "forward", "gram", "solve", "write"):
        assert rows[name].floor > 0
        assert rows[name].ratio == rows[name].seconds / rows[name].floor
    assert rows["capture"].ratio is None
    assert found.seconds == pytest.approx(sum(row.seconds for row in found.stages))
    assert set(found.gemm_rates) == {torch.float32, torch.float64}
    print_bench(found)
    captured = capsys.readouterr()
    assert captured.err == ""
    printed = captured.out
    assert "wanda 0.5, 2 x 32 tokens" in printed.replace("\n", " ")
    assert "measured: float32" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_work_is_that_of_the_model_before_it_became_smaller(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("opt", inner=64))
    sparse, smaller = (
        bench(source, method=method, sparsity="0.2", n_sequences=2, device="cpu")
        for method in ("wanda", "fasp")
    )
    forward = [
        next(row for row in found.stages if row.stage == "forward").work.total_flops
        for found in (sparse, smaller)
    ]
    assert forward[0] == forward[1] > 0


def test_pieces_are_added_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: dict[str, Any] = {"shape": "demo-llama", "blocks": 2, **SETTINGS}
    whole = bench(**arguments, device="cpu")
    monkeypatch.setattr(shapes, "PIECE_BYTES", 1)
    pieces = bench(**arguments, device="cpu")
    assert whole.title == pieces.title
    assert whole.title.startswith("2 of the ")
    flops, in_pieces = (
        {row.stage: row.work.total_flops for row in found.stages}
        for found in (whole, pieces)
    )
    assert flops["gram"] == in_pieces["gram"] > 0
    assert flops["solve"] == in_pieces["solve"] > 0
    assert flops["forward"] > in_pieces["forward"] > 0  # each piece has a last block
    assert capsys.readouterr() == ("", "")


def test_bench_needs_one_model() -> None:
    with pytest.raises(UsageError, match="one of the two"):
        bench()
    with pytest.raises(UsageError, match="one of the two"):
        bench("folder", shape="opt-125m")
    with pytest.raises(UsageError, match="unknown shape 'opt'; known: opt-125m, "):
        bench(shape="opt")
    for blocks in (0, -1):
        with pytest.raises(UsageError, match=f"at least 1; got {blocks}"):
            bench(shape="opt-125m", blocks=blocks)
    with pytest.raises(UsageError, match="blocks of a shape"):
        bench("folder", blocks=1)

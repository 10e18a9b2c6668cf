"""The GPU programme: floors by hand, and no stage is lost without a word."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.accumulator import MomentAccumulator
from layerwise.solvers.lasso_path import lasso_to_sparsity
from tests.benchmarks import gpu, gpu_layers, gpu_stages
from tests.benchmarks.captured import layers_of
from tests.benchmarks.gpu_layers import Block, Group, LayerSet, llama, opt, restored
from tests.benchmarks.gpu_stages import STAGES, Rates, Stage, Unit

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
RATES = Rates(1e6, 2e6, 3e6, 4e6, 5e6)
TINY = llama("tiny", 32, 8, 48, 3)
ROWS = {"q,k,v": 48, "o": 32, "gate,up": 96, "down": 32}


@pytest.fixture(autouse=True)
def _plain_grams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spectra of captured layers need the packaged models, and time."""

    def plain(width: int, layer: str, seed: int, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
        return inputs.T @ inputs / len(inputs)

    monkeypatch.setattr(gpu_layers, "realistic_gram", plain)


@pytest.fixture
def block() -> Block:
    found = Block(TINY, CPU)
    for group in TINY.groups:
        found.prepare(group)
    return found


def stage(name: str) -> Stage:
    (found,) = [one for one in STAGES if one.name == name]
    return found


def test_matrices_of_the_models() -> None:
    """224 matrices of Llama-3-8B, 72 of OPT-125M; the parameters are those published."""
    for layers, matrices, parameters in (
        (gpu_layers.FULL[0], 72, 84_934_656),
        (gpu_layers.FULL[1], 224, 6_979_321_856),
    ):
        count = layers.blocks * sum(len(group.rows) for group in layers.groups)
        size = layers.blocks * sum(sum(g.rows) * g.width for g in layers.groups)
        assert (count, size) == (matrices, parameters)
    assert gpu_layers.FULL_RESTORED.groups[1].width == 17920


def test_rows_of_a_group_are_stacked(block: Block) -> None:
    group = TINY.groups[0]
    whole = block.problem(group)
    parts = list(block.matrices(group))
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
    assert parts[0].moments is parts[1].moments
    assert block.moments(group) is not block.moments(group)  # no stage inherits a factor


@pytest.mark.parametrize("name", ["sparsegpt", "refit", "bounds"])
def test_floors_of_stacked_groups_by_hand(name: str, block: Block) -> None:
    for unit in stage(name).run(block, RATES, 0):
        rows, n = ROWS[unit.name], unit.width
        product = 2 * rows * n**2
        floors = {
            "sparsegpt": (n**3 / 3 + product / 2) / 3e6,
            "refit": 30 * product / 2e6,
            "bounds": 50 * product / 2e6,
        }
        assert unit.rows == rows
        assert unit.floor == pytest.approx(floors[name])
        assert unit.seconds > 0


def test_gram_takes_all_tokens(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    update = MomentAccumulator.update

    def count(self: Any, inputs: Tensor) -> None:
        assert inputs.dtype == torch.bfloat16
        seen.append(len(inputs))
        update(self, inputs)

    monkeypatch.setattr(MomentAccumulator, "update", count)
    monkeypatch.setattr(gpu_stages, "TOKENS_AT_ONCE", 40)
    units = list(stage("gram").run(block, RATES, 100))
    assert seen == [40, 40, 20] * 4
    assert units[3].floor == pytest.approx(100 * 48 * 49 / 3e6)


def test_refits_and_bounds_say_what_they_prove(block: Block) -> None:
    for unit in stage("refit").run(block, RATES, 0):
        assert unit.figures["certified"]
        assert unit.figures["certificate"] <= 1e-6
    assert list(block.answers) == list(ROWS)
    for unit in stage("bounds").run(block, RATES, 0):
        assert 0 <= unit.figures["proven_gap"] < 1


def test_restoration_by_hand() -> None:
    layers = restored("tiny", 32, 50, 1)
    found = Block(layers, CPU)
    for group in layers.groups:
        found.prepare(group)
    units = list(gpu_stages.RESTORATION.run(found, RATES, 0))
    assert [(unit.rows, unit.width) for unit in units] == [(32, 32), (32, 50)]
    assert units[1].floor == pytest.approx((40**3 / 3 + 2 * 32 * 40**2) / 4e6)
    assert all(unit.figures["certified"] for unit in units)


# --- the runner ----------------------------------------------------------------------


def good(block: Block, rates: Rates, tokens: int) -> Iterator[Unit]:
    yield Unit("one", 2, 3, 1.0, 0.5)
    yield Unit("other", 2, 3, 2.0, 0.5, {"certified": True})


def uncertified(block: Block, rates: Rates, tokens: int) -> Iterator[Unit]:
    yield Unit("one", 2, 3, 1.0, 0.5, {"certified": False})


def bad(block: Block, rates: Rates, tokens: int) -> Iterator[Unit]:
    yield Unit("one", 2, 3, 1.0, 0.5)
    message = "no luck"
    raise ValueError(message)


def slow(block: Block, rates: Rates, tokens: int) -> Iterator[Unit]:
    yield Unit("one", 2, 3, 1.0, 0.5)
    try:
        time.sleep(30)
    except Exception as error:  # a library that turns errors into its own
        message = "hidden"
        raise ValueError(message) from error


def run(tmp_path: Path, *stages: Stage, layers: LayerSet = TINY) -> gpu.Programme:
    programme = gpu.Programme(tmp_path / "out.json", CPU, small=True)
    programme.run(layers, stages, RATES)
    assert json.loads((tmp_path / "out.json").read_text()) == programme.record
    return programme


def test_totals_of_a_stage(tmp_path: Path) -> None:
    programme = run(tmp_path, Stage("good", good, "things", 9, {"tiny": 10}))
    prepared, found = programme.record["stages"]
    assert prepared["stage"] == "preparation"
    assert found["status"] == "done"
    assert (found["block_seconds"], found["model_seconds"]) == (3, 9)
    assert (found["block_floor"], found["model_floor"], found["ratio"]) == (1, 3, 3)
    assert found["target_met"]
    assert not programme.failed


@pytest.mark.parametrize(("work", "target"), [(good, 8.9), (uncertified, 10)])
def test_a_missed_target_is_said(
    work: Any, target: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path, Stage("x", work, "", 9, {"tiny": target})).record["stages"][1]
    assert not found["target_met"]
    assert "MISSED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("work", "status", "words"),
    [
        (bad, "failed", "ValueError: no luck"),
        (slow, "stopped", "share of 0 s"),
    ],
)
def test_what_did_not_finish_is_recorded(
    work: Any, status: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others go on; half a block is never multiplied by the blocks."""
    stages = Stage("one", work, "", 0.2, {"tiny": 10}), Stage("next", good, "", 9)
    programme = run(tmp_path, *stages)
    first, second = programme.record["stages"][1:]
    assert first["status"] == status
    assert words in first["error"]
    assert "model_seconds" not in first
    assert "target_met" not in first
    assert len(first["units"]) == 1
    assert second["status"] == "done"
    assert f"*** tiny one: {status.upper()}" in capsys.readouterr().out
    assert programme.failed == ["tiny one"]


def test_nothing_starts_when_the_time_is_over(tmp_path: Path) -> None:
    programme = gpu.Programme(tmp_path / "out.json", CPU, small=True)
    programme._limit = 0
    programme.run(TINY, (Stage("one", good, "", 9),), RATES)
    assert programme.failed == ["tiny preparation", "tiny one"]


def test_stages_need_a_prepared_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Tensor:
        message = "no gram"
        raise ValueError(message)

    monkeypatch.setattr(gpu_layers, "realistic_gram", fails)
    programme = run(tmp_path, Stage("one", good, "", 9))
    assert programme.failed == ["tiny preparation", "tiny one"]
    assert "no weights and grams of q,k,v, o" in programme.record["stages"][1]["error"]


def test_the_small_programme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its limits, which a busy machine exceeds; other tests are about those."""
    monkeypatch.setattr(gpu, "SMALL", (opt("tiny opt", 16, 2), TINY))
    monkeypatch.setattr(gpu, "SMALL_RESTORED", restored("tiny 30b", 16, 24, 2))
    monkeypatch.setattr(gpu, "SMALL_TOKENS", 64)
    monkeypatch.setattr(gpu, "SMALL_GEMM", 16)
    monkeypatch.setattr(gpu, "SMALL_COPY", 1 << 12)
    monkeypatch.setattr("layerwise.timing.floor.LEAST_SECONDS", 0.0)
    monkeypatch.setattr(gpu, "time_limit", lambda _: nullcontext())
    path = tmp_path / "out.json"
    assert gpu.main(["--output", str(path), "--small", "--device", "cpu"]) == 0
    found = json.loads(path.read_text())
    ran = [(one["model"], one["stage"]) for one in found["stages"]]
    names = ["preparation", *(one.name for one in STAGES)]
    assert ran == [
        (name, stage)
        for model in ("tiny opt", "tiny 30b", "tiny")
        for name in (f"{model}, warm-up", model)
        for stage in (("preparation", "restoration") if model == "tiny 30b" else names)
    ]
    whole = [one for one in found["stages"] if one["stage"] == "gram"]
    assert [len(one["units"]) for one in whole] == [1, 4, 1, 4]
    assert found["not_done"] == []
    assert set(found["ceilings"]) == {"bfloat16", "tf32", "float32", "float64", "copy"}


def test_the_full_programme_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path / "out.json"), "--device", "cpu"])


def test_every_group_has_a_captured_layer() -> None:
    known = {f"{model}/{layer}" for model in ("llama", "opt") for layer in layers_of(model)}
    groups: list[Group] = []
    for layers in (*gpu_layers.FULL, *gpu_layers.SMALL, gpu_layers.FULL_RESTORED):
        groups += layers.groups
    assert {group.captured for group in groups} == known


def test_the_programme_needs_few_packages() -> None:
    """A machine with a GPU is borrowed as it is."""
    missing = ("pydantic", "cvxpy", "ray", "matplotlib", "datasets", "lm_eval")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); "
    code += "import tests.benchmarks.gpu, tests.test_gpu, tests.test_sweep_kernel"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_penalty_that_misses_the_sparsity_is_not_certified(
    block: Block, monkeypatch: pytest.MonkeyPatch
) -> None:
    def misses(problem: Any, sparsity: float, **options: Any) -> Any:
        return lasso_to_sparsity(problem, sparsity + 0.1, **options)

    (first, *_) = stage("fista").run(block, RATES, 0)
    assert first.figures["certified"]
    monkeypatch.setattr(gpu_stages, "lasso_to_sparsity", misses)
    (first, *_) = stage("fista").run(block, RATES, 0)
    assert not first.figures["certified"]

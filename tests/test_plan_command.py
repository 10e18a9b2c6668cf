"""The command plan: its tables, its JSON, its exit codes, and the time that it takes."""

import json
import time
from pathlib import Path

import pytest

from layerwise.cli import run
from layerwise.demo import model_path
from layerwise.planning import plan as plan_module
from layerwise.planning.estimate import quick_machine
from layerwise.planning.plan import plan_run
from layerwise.reports.plan_text import in_time
from layerwise.run.capacity import Capacity
from tests.support.planning import LARGE, FixedRates, saved


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "capacity_of", lambda device, output: LARGE)
    monkeypatch.setattr(plan_module, "quick_machine", FixedRates)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01234, "0.0123 s"), (99.4, "99.4 s"), (100, "1.67 min"), (36000, "10 h")],
)
def test_times_are_readable(seconds: float, text: str) -> None:
    assert in_time(seconds) == text


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines without a terminal, and the same as JSON."""
    folder, model = saved(tmp_path, "llama")
    path = tmp_path / "plan.json"
    arguments = ["plan", str(folder), "--sparsity", "2:4", "--method", "sparsegpt"]
    arguments += ["--n-sequences", "4", "--json", str(path), "--device", "cpu"]
    assert run([*arguments, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "2 x model.layers.*.self_attn.q_proj" in shown
    assert "16x16" in shown
    assert "outside the decoder blocks" in shown
    assert "50.0000% of the" in shown
    assert "largest gram: 24 x 24" in shown
    found = json.loads(path.read_text())
    assert found["method"] == "sparsegpt"
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["zeros"] * 2 == found["pruned_parameters"]
    assert found["memory"]["host"]["peak"] == max(
        sum(items.values()) for items in found["memory"]["host"]["moments"].values()
    )
    assert found["largest_gram"] == 24
    assert [stage["stage"] for stage in found["stages"]] == [
        *("load", "hash", "forward", "gram", "solve", "write")
    ]
    assert found["refused"] is None
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ([], 2, "missing --sparsity"),
        (["--sparsity", "0.5", "--targets", "q"], 2, "matches nothing"),
        (["--sparsity", "2:4", "--group", "layer"], 2, "group layer cannot be combined"),
        (
            ["--sparsity", "0.5", "--group", "column"],
            2,
            "group: Input should be 'row' or 'layer'",
        ),
        (["--sparsity", "1:5"], 2, "needs a width divisible by 5"),
    ],
)
def test_exit_codes(
    flags: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = saved(tmp_path, "llama")
    assert run(["plan", str(folder), *flags, "--device", "cpu"]) == code
    assert message in capsys.readouterr().err


def test_the_table_comes_before_the_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = saved(tmp_path, "llama")
    monkeypatch.setattr(plan_module, "capacity_of", lambda *_: Capacity(1000, None, None))
    assert run(["plan", str(folder), "--sparsity", "0.5", "--device", "cpu"]) == 5
    caught = capsys.readouterr()
    assert "model.layers.*.mlp.down_proj" in caught.out
    assert caught.err.rpartition("\r")[2].count("\n") <= 2
    assert "layerwise: this run needs " in caught.err


def test_the_plan_of_the_packaged_model_takes_no_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Imports left out: the second of two, in time of the processor, rates measured."""
    monkeypatch.setattr(plan_module, "quick_machine", quick_machine)
    seconds = []
    for _ in range(2):
        start = time.process_time()
        plan_run(model_path("llama"), "fista", "2:4", device="cpu")
        seconds.append(time.process_time() - start)
    assert seconds[1] < 2.0

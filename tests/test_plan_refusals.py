"""A plan refuses what a prune refuses: with the same text, before anything is read."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from layerwise.cli import run
from layerwise.planning import plan as plan_module
from layerwise.run.models import opening
from layerwise.run.models.residency import Streamed
from tests.support.command_line import (
    cut_shard,
    fill_workshop,
    flags,
    kept_in_order,
    one_line,
)
from tests.support.models import SHARD, edit_shard
from tests.support.planning import FixedRates
from tests.test_cli import BAD


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_workshop(tmp_path_factory.mktemp("workshop"))


@pytest.fixture
def in_workshop(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in the workshop, on a machine that is not measured."""
    monkeypatch.chdir(workshop)
    monkeypatch.setattr(plan_module, "quick_machine", FixedRates)
    with kept_in_order(workshop):
        yield workshop


# what a plan does not read: the text, the weights; and what it can do without
NOT_IN_A_PLAN = {
    *("no calibration", "no output", "budget", "text empty", "text short", "text binary"),
    *("json lines", "no such field"),
}


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [case for name, case in BAD.items() if name not in NOT_IN_A_PLAN],
    ids=[name for name in BAD if name not in NOT_IN_A_PLAN],
)
def test_a_plan_refuses_what_a_prune_refuses(
    in_workshop: Path,
    changes: Mapping[str, Any],
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["plan", *flags(changes)[1:]]) == code
    assert expected in one_line(capsys.readouterr().err)


def edited(name: str, **changes: Any) -> Callable[[Path], object]:
    """Damage that sets values of a JSON file of a model; None removes one."""

    def damage(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        values = {key: value for key, value in values.items() if value is not None}
        (folder / name).write_text(json.dumps(values))

    return damage


def without(*names: str) -> Callable[[Path], object]:
    """Damage that removes tensors."""
    return lambda folder: edit_shard(
        folder / SHARD, lambda tensors: [tensors.pop(name) for name in names]
    )


DAMAGED: Mapping[str, tuple[Callable[[Path], object], int]] = {
    "cut": (cut_shard, 6),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), 6),
    "tokenizer of another kind": (edited("tokenizer.json", model={"type": "Odd"}), 6),
    "no vocabulary": (edited("tokenizer.json", model=None), 6),
    "no norm": (without("model.norm.weight"), 6),
    "no block": (without("model.layers.1.mlp.up_proj.weight", "lm_head.weight"), 6),
    "a word as a width": (edited("config.json", hidden_size="wide"), 6),
    "no width": (edited("config.json", intermediate_size=0), 6),
    "negative layers": (edited("config.json", num_hidden_layers=-1), 6),
    "many layers": (edited("config.json", num_hidden_layers=10**9), 6),
    "few layers": (edited("config.json", num_hidden_layers=1), 6),
    "foreign": (edited("config.json", model_type="unheard-of"), 2),
    "no type": (edited("config.json", model_type=None), 6),
}


@pytest.mark.parametrize(("damage", "code"), DAMAGED.values(), ids=list(DAMAGED))
def test_plan_and_prune_agree_on_a_damaged_model(
    in_workshop: Path,
    tmp_path: Path,
    damage: Callable[[Path], object],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(folder := shutil.copytree(in_workshop / "llama", tmp_path / "damaged"))
    line = flags({"MODEL": str(folder)})
    assert run(line) == code
    refusal = one_line(capsys.readouterr().err)
    assert run(["plan", *line[1:]]) == code
    assert capsys.readouterr().err == refusal


def test_output_in_the_way(in_workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the tables of the plan."""
    (in_workshop / "out").mkdir()
    (in_workshop / "out" / "thesis.txt").write_text("precious")
    assert run(flags({})) == 2
    refusal = one_line(capsys.readouterr().err)
    assert run(["plan", *flags({})[1:]]) == 2
    shown = capsys.readouterr()
    assert shown.err.endswith(refusal)
    assert "q_proj" in shown.out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--targets": "Conv2d"}, "matches nothing"),
        ({"MODEL": "mute"}, "text.txt needs a tokenizer"),
        ({"--sequence-length": "33"}, "exceeds"),
        ({"--calibration": "none.txt"}, "cannot read none.txt"),
        ({"--method": "wanda+flap"}, "flap does not handle the pattern 0.5"),
        ({"--method": "columns", "--targets": "re:.*up_proj"}, "targets"),
    ],
)
def test_prune_refuses_before_it_reads_weights(
    in_workshop: Path,
    changes: Mapping[str, Any],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def read(*_: Any, **__: Any) -> None:
        pytest.fail("the weights were read")

    monkeypatch.setattr(Streamed, "open", read)
    monkeypatch.setattr(opening, "load_model", read)
    assert run(flags(changes)) in (2, 6)
    assert expected in one_line(capsys.readouterr().err)

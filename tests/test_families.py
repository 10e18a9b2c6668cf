"""Every decoder type of transformers: pruned, or refused with a reason; never a fault.

A few types that once failed always run. All of them, marked ``exhaustive``, take ten to
twenty minutes of one core; ``python -m tests.benchmarks.families`` prints them as a table.
"""

import warnings
from pathlib import Path

import pytest

from tests.benchmarks.families import remark
from tests.support.families import FAMILIES
from tests.support.family_run import Row, run_family

ALWAYS = (
    "cpmant",  # its first parameter is inside a block
    "gemma3n_text",  # other lists of linears run before the blocks
)


@pytest.fixture(autouse=True)
def _transformers_may_warn() -> None:
    """Some types warn about their own default configuration."""
    warnings.simplefilter("ignore")


def test_the_list_is_long() -> None:
    assert len(FAMILIES) >= 90
    assert set(ALWAYS) <= set(FAMILIES)


@pytest.mark.parametrize("family", ALWAYS)
def test_types_that_once_failed(family: str, tmp_path: Path) -> None:
    row = run_family(family, tmp_path)
    assert row.result == "pruned", row.reason
    assert 0 < row.pruned <= row.linears


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(ALWAYS)))
def test_every_type(family: str, tmp_path: Path) -> None:
    row = run_family(family, tmp_path)
    assert row.result in ("pruned", "refused", "not built"), row.reason
    assert row.reason or row.result == "pruned"
    assert "\n" not in row.reason


def test_a_wrong_result_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of a row see a result that differs from a run in memory."""
    monkeypatch.setattr("tests.support.family_run.differing", lambda *_: ["a.weight"])
    row = run_family("gpt2", tmp_path)
    assert row == Row("gpt2", "fault", row.reason, "found")
    assert row.reason == "1 tensors differ from a run in memory: ['a.weight']"


def test_a_remark_names_what_is_left_dense() -> None:
    reason = (
        "6 weights of the blocks, 34.3% of their parameters, cannot be pruned, such as "
        "model.layers.1.mlp.experts.up (a parameter of shape (4, 8) outside linear "
        "layers), model.layers.1.mlp.router (called 0 times in a forward pass); to leave "
        "them dense, ignore re:model"
    )
    assert remark(reason) == (
        "left dense, 34.3% of the blocks: `mlp.experts.up` (a parameter), `mlp.router` "
        "(called 0 times)"
    )

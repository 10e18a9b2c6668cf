"""Plans: every parameter with its verdict, exact counts, refusals, and nothing is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.errors import (
    DataError,
    InvalidProblemError,
    MemoryBudgetError,
    UnsupportedModelError,
    UsageError,
)
from layerwise.patterns import NM, Pattern, Unstructured
from layerwise.planning import plan as plan_module
from layerwise.planning.inventory import starred, zeros_of
from layerwise.planning.plan import plan_run
from layerwise.planning.plan_result import Plan
from layerwise.reports.plan_text import lines, sections
from layerwise.run.capacity import Capacity, capacity_of, free_disk, free_host
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model
from layerwise.run.prune import prune_model
from tests.support.checkpoints import edit_json
from tests.support.models import (
    FAMILIES,
    edit_shard,
    mixture_of_experts,
    random_tokens,
    save_checkpoint,
)
from tests.support.planning import LARGE, FixedRates, saved

SMALL: dict[str, Any] = {"n_sequences": 4, "sequence_length": 16, "device": "cpu"}
EXPERTS = r"re:.*\.experts\."


def planned(folder: Path, method: Any = "wanda", sparsity: Any = 0.5, **more: Any) -> Plan:
    return plan_run(folder, method, sparsity, **{**SMALL, **more})


def verdicts(plan: Plan) -> dict[str, str]:
    """Status or reason of every parameter."""
    return {
        member: group.reason or group.status
        for group in plan.groups
        for member in group.members
    }


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "capacity_of", lambda device, output: LARGE)
    monkeypatch.setattr(plan_module, "quick_machine", FixedRates)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_planned_is_what_is_pruned(family: str, tmp_path: Path) -> None:
    """Names, shapes and counts of zeros, against a run and against enumeration."""
    folder, model = saved(tmp_path, family)
    ignore = [] if family not in ("mamba2", "falcon_mamba") else [r"re:.*conv1d"]
    plan = planned(folder, ignore=ignore or ("lm_head",))
    report = prune_model(model, "wanda", 0.5, calibration=random_tokens(4, 16), **SMALL)
    chosen = [g for g in plan.groups if g.status == "pruned"]
    names = {m.removesuffix(".weight") for g in chosen for m in g.members}
    assert names == {record.name for record in report.records}
    assert plan.pruned == sum(r.shape[0] * r.shape[1] for r in report.records)
    assert plan.zeros == sum(int((~mask).sum()) for mask in report.masks.values())
    assert plan.parameters == sum(p.numel() for p in model.parameters())
    assert plan.refusal is None
    found = [member for group in plan.groups for member in group.members]
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert sorted(found) == sorted(every)


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(0.5), Unstructured(0.29), Unstructured(0.7, "layer"), NM(2, 4), NM(1, 8)],
)
def test_zeros_are_those_of_the_mask(pattern: Pattern) -> None:
    for shape in [(3, 16), (7, 24), (5, 8)]:
        mask = pattern.mask(torch.rand(shape))
        assert zeros_of(pattern, shape) == int((~mask).sum())


def test_reasons(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "llama")
    plan = planned(
        folder,
        targets=["re:.*_proj"],
        ignore=["model.layers.0.self_attn.q_proj", "re:.*mlp.up"],
    )
    found = verdicts(plan)
    block = "model.layers.0"
    q_proj, up_proj = f"{block}.self_attn.q_proj", f"{block}.mlp.up_proj"
    assert found[f"{q_proj}.weight"] == f"ignored by '{q_proj}'".replace(".0.", ".*.")
    assert found["model.layers.1.self_attn.q_proj.weight"] == "pruned"
    assert found[f"{up_proj}.weight"] == "ignored by 're:.*mlp.up'"
    assert found["model.embed_tokens.weight"] == "outside the decoder blocks"
    assert found["lm_head.weight"] == "outside the decoder blocks"
    assert found[f"{block}.input_layernorm.weight"] == "a vector"
    only = verdicts(planned(folder, targets=["re:.*mlp"]))
    assert only[f"{q_proj}.weight"] == "not in targets"


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    folder, model = saved(tmp_path, "llama", tied=True)
    plan = planned(folder)
    found = verdicts(plan)
    assert found["lm_head.weight"] == "shared with model.embed_tokens.weight"
    assert plan.parameters == sum(p.numel() for p in model.parameters())


def test_blocks_that_are_alike_share_a_line(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "opt", layers=3)
    plan = planned(folder)
    group = next(g for g in plan.groups if g.name.endswith("fc1"))
    assert group.name == "model.decoder.layers.*.fc1"
    assert group.count == 3
    assert group.shape == (24, 16)
    assert group.zeros == 3 * 24 * 8


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("model.layers.12.mlp.experts.3.up", "model.layers.*.mlp.experts.*.up"),
        ("layers.0", "layers.*"),
        ("fc1.weight", "fc1.weight"),
        ("h.0.c_fc2", "h.*.c_fc2"),
    ],
)
def test_numbers_of_blocks_become_stars(text: str, found: str) -> None:
    assert starred(text) == found


def test_experts_are_refused_as_a_run_refuses_them_until_they_are_ignored(
    tmp_path: Path,
) -> None:
    folder = save_checkpoint(tmp_path / "moe", mixture_of_experts(), tokenizer=False)
    plan = planned(folder)
    with pytest.raises(UnsupportedModelError, match="cannot be pruned") as caught:
        plan.check()
    with pytest.raises(UnsupportedModelError) as raised:
        prune_model(folder, "wanda", 0.5, calibration=random_tokens(4, 16), **SMALL)
    assert str(caught.value) == str(raised.value)
    refused = [g for g in plan.groups if g.status == "refused"]
    assert refused
    assert all("outside linear layers" in group.reason for group in refused)
    left = planned(folder, ignore=["lm_head", EXPERTS])
    left.check()
    reasons = [g.reason for g in left.groups if "experts" in g.name]
    assert all(reason.endswith(f"; ignored by {EXPERTS!r}") for reason in reasons)


def test_widths_that_m_does_not_divide_are_refused_by_name(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "llama", inner=18)
    plan = planned(folder, sparsity="2:4")
    with pytest.raises(InvalidProblemError, match=r"0\.mlp\.down_proj: pattern 2:4 needs"):
        plan.check()
    refused = [group.name for group in plan.groups if group.status == "refused"]
    assert refused == ["model.layers.*.mlp.down_proj"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"targets": ["q_proj"]}, "targets entry 'q_proj' matches nothing"),
        ({"ignore": ["k_proj"]}, "ignore entry 'k_proj' matches nothing"),
        ({"ignore": ["re:.*_proj"]}, "nothing is left to prune"),
        ({"n_sequences": 0}, "n_sequences is 0: at least 1 window is needed"),
        ({"sequence_length": 33}, "exceeds the 32 positions"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"workers": 2, "error_correction": "full"}, "a block waits for the one before it"),
        ({"workers": 2, "method": "gblm"}, "workers take one block at a time"),
        ({"activations": "tape"}, "activations is one of auto, memory, disk"),
        ({"error_correction": "some"}, "error_correction is one of"),
        ({"method": "wander"}, "unknown method 'wander'"),
        ({"sparsity": None}, "say how much to prune"),
        ({"sequence_length": 1}, "at least 2 tokens are needed"),
        ({"seed": -1}, "seed is -1"),
        ({"calibration": "wikitext"}, "did you mean 'wikitext2'"),
        ({"method": "fasp", "sparsity": 0.3}, "`plan` covers only runs that zero weights"),
    ],
)
def test_impossible_arguments(
    arguments: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    folder, _ = saved(tmp_path, "llama")
    with pytest.raises(UsageError) as caught:
        planned(folder, **arguments)
    assert expected in str(caught.value)


def _one_more_layer(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=3)


def _one_layer_less(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)


def _another_width(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=32)


def _a_tensor_gone(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_shard(folder / "model.safetensors", lambda tensors: tensors.pop(name))


@pytest.mark.parametrize(
    "damage", [_one_more_layer, _one_layer_less, _another_width, _a_tensor_gone]
)
def test_headers_that_contradict_the_configuration(damage: Any, tmp_path: Path) -> None:
    """The same error as that of a run, word by word."""
    folder, _ = saved(tmp_path, "llama")
    damage(folder)
    with pytest.raises(DataError) as planned_error:
        planned(folder)
    with pytest.raises(DataError) as loading_error:
        load_model(Checkpoint.open(folder))
    assert str(planned_error.value) == str(loading_error.value)


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = saved(tmp_path, "llama")

    def never(*_: Any) -> Any:
        message = "a plan read tensors"
        raise AssertionError(message)

    monkeypatch.setattr(Checkpoint, "tensors", never)
    monkeypatch.setattr(nn.Module, "load_state_dict", never)
    assert planned(folder).zeros
    names = ["model.safetensors"]
    for name in names:  # NaN is none of its business
        edit_shard(
            folder / name, lambda tensors: tensors["lm_head.weight"].fill_(torch.nan)
        )
    assert planned(folder).zeros


@pytest.mark.parametrize("method", ["fista", "wanda+least-squares", "swaps", "obs"])
def test_time_and_memory_of_every_method_are_known(method: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "opt")
    plan = planned(folder, method)
    assert all(stage.seconds is not None for stage in plan.stages)
    assert not any("not known" in note for note in plan.notes)
    shown = "\n".join(line for section in sections(plan) for line in lines(section))
    assert "unknown" not in shown


def test_notes(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "gpt2")
    notes = " ".join(planned(folder, certify=True).notes)
    assert "no adapter is declared for this GPT2LMHeadModel" in notes
    assert "proven gaps are not counted" in notes
    notes = " ".join(planned(folder, "gblm").notes)
    assert "gradients are not counted" in notes
    assert "whole model in memory" in notes


def test_memory_that_is_short_is_refused_with_what_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved(tmp_path, "llama")
    arguments: dict[str, Any] = {"n_sequences": 512, "activations": "memory"}
    need = planned(folder, **arguments).memory.bytes("host")
    for free, fits in ((need, True), (need - 1, False)):
        short = Capacity(free, None, 1 << 40)
        monkeypatch.setattr(plan_module, "capacity_of", lambda *_, found=short: found)
        plan = planned(folder, **arguments)
        slack = plan.memory.bytes("host") - need  # this process has grown
        assert (plan.refusal is None) == (fits and slack <= 0) or slack > 0
    with pytest.raises(MemoryBudgetError, match="what would fit: ") as caught:
        plan.check()
    assert caught.value.exit_code == 5
    options = dict(
        option.removeprefix("--").split(" ")
        for option in str(caught.value).partition("what would fit: ")[2].split(", or ")
    )
    assert {"n-sequences", "sequence-length", "activations"} <= set(options)
    count = int(options["n-sequences"])
    monkeypatch.setattr(plan_module, "own_memory", lambda: plan_base(plan))
    short = Capacity(need - 1, None, 1 << 40)
    monkeypatch.setattr(plan_module, "capacity_of", lambda *_: short)
    assert planned(folder, **{**arguments, "n_sequences": count}).refusal is None
    assert planned(folder, **{**arguments, "n_sequences": count + 1}).refusal is not None


def plan_base(plan: Plan) -> int:
    items = plan.memory.instants[0].items
    return next(item.bytes for item in items if item.name.startswith("Python"))


def test_memory_that_is_short_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved(tmp_path, "llama")
    monkeypatch.setattr(plan_module, "capacity_of", lambda *_: Capacity(1000, None, None))
    with pytest.raises(MemoryBudgetError, match="no setting of this run fits"):
        planned(folder).check()


def test_a_disk_that_is_short_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved(tmp_path, "llama")
    need = sum(planned(folder).disk.values())
    for free in (need, need - 1):
        found = Capacity(1 << 40, None, free)
        monkeypatch.setattr(plan_module, "capacity_of", lambda *_, found=found: found)
        plan = planned(folder)
        assert (plan.refusal is None) == (free == need)
    with pytest.raises(DataError, match="free 0 MiB more, or choose"):
        plan.check()


def test_workers_need_memory_each_and_files_that_wait_for_them(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, "llama")
    one, two = planned(folder), planned(folder, workers=2)
    names = {item.name for item in two.memory.peak("host").items}
    assert {"2 x block", "driver: block", "driver: hidden states"} <= names
    states = 4 * 16 * 16 * 4
    waiting = "inputs of blocks that wait for a worker"
    assert two.disk == {**one.disk, waiting: (2 + 2) * states}


@pytest.mark.parametrize(("mode", "sets"), [("block", 2), ("full", 4)])
def test_hidden_states_go_to_the_disk_where_memory_is_short(
    mode: str, sets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = saved(tmp_path, "llama")
    states = sets * 4 * 16 * 16 * 4
    for free, on_disk in ((4 * states, False), (4 * states - 1, True)):
        found = Capacity(free, None, 1 << 40)
        monkeypatch.setattr(plan_module, "capacity_of", lambda *_, found=found: found)
        plan = planned(folder, error_correction=mode)
        assert plan.on_disk == on_disk
        assert plan.disk.get("hidden states", 0) == states * on_disk


def test_what_is_free_is_asked_of_the_system(tmp_path: Path) -> None:
    found = capacity_of(torch.device("cpu"), tmp_path / "not" / "there" / "yet")
    assert found.host is not None
    assert found.host > 1 << 20
    assert found.device is None
    assert found.disk == pytest.approx(free_disk(tmp_path / "x"), rel=0.05)
    assert capacity_of(torch.device("cpu"), None).disk is None
    assert free_host() == pytest.approx(found.host, rel=0.2)

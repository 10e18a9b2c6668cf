"""retrain_model on models and folders: what it needs, writes, resumes and refuses."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import layerwise
from layerwise.cli import run
from layerwise.errors import DataError, LayerwiseError, UsageError
from layerwise.recovery import next_token
from layerwise.recovery.output import RECORDS, SETTINGS
from layerwise.run.data.perplexity import mean_loss
from layerwise.run.outputs.output import Manifest
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline.journal import Journal, read_masks
from layerwise.run.prune import prune_model
from tests.support.models import (
    SHARD,
    edit_shard,
    random_tokens,
    save_checkpoint,
    shard_hashes,
    tiny_model,
    tiny_text,
)
from tests.support.retraining import (
    TOKENS,
    Listener,
    pruned_model,
    retrain,
    values,
    zeros_kept,
)

WINDOWS: dict[str, Any] = {"n_sequences": 8, "sequence_length": 12}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bfloat16, pruned to 2:4 by Wanda, and smaller in two formats."""
    root = tmp_path_factory.mktemp("retrain")
    save_checkpoint(root / "source", tiny_model("llama", dtype=torch.bfloat16))
    (root / "text.txt").write_text(tiny_text())
    common: dict[str, Any] = {"calibration": str(root / "text.txt"), **WINDOWS}
    prune_model(
        root / "source", "wanda", sparsity="2:4", output_dir=root / "pruned", **common
    )
    formats: dict[str, Any] = {"smaller": "stock", "native": "native"}
    for name, format in formats.items():
        prune_model(
            root / "source",
            "fasp",
            sparsity=0.2,
            multiple=1,
            output_dir=root / name,
            format=format,
            **common,
        )
    return root


def retrained(workshop: Path, output: Path, source: str = "pruned", **options: Any) -> Any:
    given: dict[str, Any] = {
        "calibration": str(workshop / "text.txt"),
        "batch_size": 2,
        "steps": 6,
        "rank": 2,
        "save_every": 2,
        "output_dir": output,
        **WINDOWS,
        **options,
    }
    return layerwise.retrain_model(workshop / source, **given)


@pytest.mark.parametrize("objective", ["tokens", "block", "parts", "matrix"])
@pytest.mark.parametrize("parameters", ["masklora", "norms", "full"])
def test_folder_is_verified_and_opens(
    workshop: Path, tmp_path: Path, objective: str, parameters: str
) -> None:
    if (objective, parameters) == ("matrix", "norms"):
        with pytest.raises(UsageError, match="nothing to train"):
            retrained(workshop, tmp_path / "out", objective=objective, parameters="norms")
        return
    report = retrained(
        workshop,
        tmp_path / "out",
        objective=objective,
        parameters=parameters,
        learning_rate=0.01,
    )
    assert report.output_dir == tmp_path / "out"
    assert all(check.holds for check in verify(tmp_path / "out"))
    masks = read_masks(tmp_path / "out")
    assert masks.keys() == read_masks(workshop / "pruned").keys()
    assert zeros_kept(layerwise.load(tmp_path / "out"), masks)
    before = load_file(workshop / "pruned" / SHARD)
    after = load_file(tmp_path / "out" / SHARD)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert changed <= set(Manifest.read(tmp_path / "out").retrained)
    assert all(tensor.dtype == torch.bfloat16 for tensor in after.values())
    own = dict(report.model.named_parameters())
    assert all(torch.equal(own[name], after[name]) for name in changed)
    settings = yaml.safe_load((tmp_path / "out" / SETTINGS).read_text())
    assert settings["parameters"] == parameters
    lines = (tmp_path / "out" / "layerwise" / RECORDS).read_text().splitlines()
    assert len(lines) == len(report.records)


def test_tokens_lower_the_loss_on_what_is_held_out() -> None:
    model, masks = pruned_model("llama")
    report = retrain(
        model,
        masks=masks,
        objective="tokens",
        parameters="norms+head+masklora",
        learning_rate=(1e-6, 3e-2),
        steps=12,
    )
    (record,) = report.records
    assert record.learning_rate == 3e-2
    assert record.after < record.before
    held_out = TOKENS[12:].flatten()
    loss = mean_loss(model, held_out, sequence_length=TOKENS.shape[1])
    assert record.after == pytest.approx(loss, rel=1e-6)
    before = mean_loss(pruned_model("llama")[0], held_out, sequence_length=TOKENS.shape[1])
    assert record.before == pytest.approx(before, rel=1e-6)
    assert zeros_kept(model, masks)
    assert report.fraction == record.trained / sum(p.numel() for p in model.parameters())


def test_checkpointing_changes_nothing() -> None:
    found = []
    for checkpointing in (False, True):
        model, masks = pruned_model("llama")
        report = retrain(
            model,
            masks=masks,
            objective="tokens",
            checkpointing=checkpointing,
            learning_rate=1e-2,
        )
        found.append((report.records[0].losses, values(model)))
        assert not any("forward" in vars(block) for block in model.model.layers)
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][n]) for n, value in found[0][1].items())


def test_a_kept_weight_that_is_zero_learns_and_a_removed_one_does_not() -> None:
    model, masks = pruned_model("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = model.get_parameter(name)
    place = masks[name].nonzero()[0].tolist()
    with torch.no_grad():
        weight[place[0], place[1]] = 0
    retrain(
        model,
        masks=masks,
        dense=tiny_model("llama"),
        parameters="full",
        learning_rate=1e-2,
    )
    assert float(weight.detach()[place[0], place[1]]) != 0
    assert zeros_kept(model, masks)


def test_generators_modes_and_gradients_are_left_alone() -> None:
    model, masks = pruned_model("opt")
    model.train()
    state = torch.random.get_rng_state()
    retrain(model, masks=masks, objective="tokens")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


class Killed(BaseException):
    """Ends a run as nothing can catch it."""


@pytest.mark.parametrize("objective", ["tokens", "block"])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_killed_run_resumes_and_ends_with_the_same_bytes(
    workshop: Path,
    tmp_path: Path,
    objective: str,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed after its first, second or third state, within a rate or between two."""
    options: dict[str, Any] = {"objective": objective, "learning_rate": (1e-2, 2e-2)}
    retrained(workshop, tmp_path / "whole", **options)
    count = 0

    def die(self: Any, *args: Any, write: Any = Journal.write_state) -> None:
        nonlocal count
        write(self, *args)
        count += 1
        if count == after:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write_state", die)
        if objective == "block" and after == 3:  # there are two blocks
            patch.setattr(Journal, "finish", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            retrained(workshop, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    listener = Listener()
    retrained(workshop, tmp_path / "out", callbacks=[listener], **options)
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")
    assert len(listener.steps) < listener.total
    assert not (tmp_path / "out.partial").exists()


def test_another_run_does_not_continue_it(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "other").write_text("")
    with pytest.raises(UsageError, match="not an unfinished run"):
        retrained(workshop, tmp_path / "out")


def test_damaged_state_is_refused(
    workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Any, *args: Any, write: Any = Journal.write_state) -> None:
        write(self, *args)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write_state", die)
        with pytest.raises(Killed):
            retrained(workshop, tmp_path / "out", objective="tokens")
    (path,) = (tmp_path / "out.partial" / "layerwise" / "blocks").iterdir()
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        retrained(workshop, tmp_path / "out", objective="tokens")
    retrained(workshop, tmp_path / "out", objective="tokens", resume=False)


@pytest.mark.parametrize("source", ["smaller", "native"])
def test_smaller_model_is_retrained_too(
    workshop: Path, tmp_path: Path, source: str
) -> None:
    for objective in ("tokens", "block", "parts"):
        out = tmp_path / objective
        retrained(
            workshop,
            out,
            source,
            objective=objective,
            parameters="norms+masklora",
            learning_rate=1e-2,
        )
        assert all(check.holds for check in verify(out))


def test_retrained_folder_can_be_retrained_again(workshop: Path, tmp_path: Path) -> None:
    retrained(workshop, tmp_path / "one", parameters="norms")
    report = layerwise.retrain_model(
        tmp_path / "one",
        calibration=str(workshop / "text.txt"),
        steps=4,
        batch_size=2,
        output_dir=tmp_path / "two",
        learning_rate=1e-2,
        **WINDOWS,
    )
    assert len(report.records) == 2
    assert all(check.holds for check in verify(tmp_path / "two"))


def test_lost_zeros_are_noticed_by_the_run_and_by_verify(
    workshop: Path, tmp_path: Path
) -> None:
    shutil.copytree(workshop / "pruned", tmp_path / "pruned")
    name, mask = next(iter(read_masks(tmp_path / "pruned").items()))

    def lose(tensors: dict[str, Any]) -> None:
        tensors[name][~mask] = 1.0

    edit_shard(tmp_path / "pruned" / SHARD, lose)
    with pytest.raises(UsageError, match="weights that its mask removes"):
        layerwise.retrain_model(
            tmp_path / "pruned", calibration=TOKENS, objective="tokens", **WINDOWS
        )


def test_impossible_arguments_touch_nothing(workshop: Path, tmp_path: Path) -> None:
    model, masks = pruned_model("llama")
    before = values(model)
    dense = tiny_model("llama")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"parameters": "lora"}, "parameters must be joined from"),
        ({"parameters": "head"}, "choose the objective tokens"),
        ({"objective": "layer"}, "objective must be one of"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"learning_rate": 0}, "learning rates must be finite and above 0"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"batch_size": 16}, "at least two batches"),
        ({"optimizer": "sgd"}, "optimizer must be one of"),
        ({"error_correction": "block"}, "error_correction of a reconstruction"),
        ({"masks": None}, "give masks=report.masks"),
        ({"masks": {"x": torch.ones(2, dtype=torch.bool)}}, "no such parameter"),
        ({"output_dir": tmp_path / "out"}, "cannot be written to output_dir"),
        ({"dense": tiny_model("llama", layers=3)}, "3 blocks"),
    ]
    for options, message in cases:
        with pytest.raises(LayerwiseError, match=message):
            retrain(model, **{"masks": masks, "dense": dense, **options})
    with pytest.raises(UsageError, match="a folder has its own"):
        retrained(workshop, tmp_path / "out", masks=masks)
    with pytest.raises(DataError, match="not an output of layerwise"):
        retrained(workshop, tmp_path / "out", "source")
    shutil.copytree(workshop / "pruned", tmp_path / "moved")
    recipe = (tmp_path / "moved" / "recipe.yaml").read_text()
    (tmp_path / "moved" / "recipe.yaml").write_text(
        recipe.replace(str(workshop / "source"), str(tmp_path / "gone"))
    )
    manifest = tmp_path / "moved" / "layerwise" / "manifest.json"
    text = manifest.read_text()
    with pytest.raises(LayerwiseError, match=r"recipe\.yaml is not as the run wrote it"):
        retrained(tmp_path, tmp_path / "out", "moved", calibration=TOKENS)
    manifest.write_text(json.dumps(json.loads(text) | {"files": {}}))  # an older version
    with pytest.raises(LayerwiseError, match="gone"):
        retrained(tmp_path, tmp_path / "out", "moved", calibration=TOKENS)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_loss_that_is_not_finite_is_an_error_and_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, masks = pruned_model("llama")
    kinds = [type(module) for module in model.modules()]
    before = values(model)
    with pytest.raises(LayerwiseError, match="not finite with any learning rate"):
        retrain(model, masks=masks, objective="tokens", learning_rate=1e30)
    monkeypatch.setattr(next_token, "mean_loss", lambda *_, **__: math.nan)
    with pytest.raises(LayerwiseError, match="before any training"):
        retrain(model, masks=masks, objective="tokens")
    assert [type(module) for module in model.modules()] == kinds
    after = values(model)
    assert before.keys() == after.keys()


def test_command_line(
    workshop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["retrain", str(workshop / "pruned"), "--steps", "3", "--rank", "2"]
    command += ["--calibration", str(workshop / "text.txt"), "--n-sequences", "8"]
    command += ["--sequence-length", "12", "--batch-size", "2", "--threads", "1"]
    command += ["--output", str(tmp_path / "out")]
    assert run([*command, "--learning-rate", "1e-2,x"]) == 2
    assert "--learning-rate takes numbers" in capsys.readouterr().err
    assert run([*command, "--learning-rate", "1e-3,1e-2", "--parameters", "norms"]) == 0
    shown = capsys.readouterr().err
    assert "retraining, at most 12 updates" in shown
    assert "model.layers.1" in shown
    assert "parameters trained" in shown
    assert run(["verify", str(tmp_path / "out")]) == 0
    assert run(command) == 2
    assert "exists; choose another output" in capsys.readouterr().err


def test_random_tokens_differ_by_seed() -> None:
    """The seed decides windows, order and factors."""
    found = []
    for seed in (0, 0, 1):
        model, masks = pruned_model("llama")
        retrain(
            model,
            masks=masks,
            objective="tokens",
            calibration=random_tokens(20, 12).flatten(),
            seed=seed,
            learning_rate=1e-2,
        )
        found.append(values(model))
    names = [name for name in found[0] if "q_proj" in name]
    assert all(torch.equal(found[0][name], found[1][name]) for name in names)
    assert not all(torch.equal(found[0][name], found[2][name]) for name in names)

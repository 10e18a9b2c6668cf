"""Kinds of removal: zeros, channels, and a third kind that is one class."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from layerwise.errors import UsageError
from layerwise.patterns import Pattern
from layerwise.run import settings as module
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.channels.removal import RemoveChannels
from layerwise.run.models.opening import OpenedModel, open_model
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline.block_files import MASK, WEIGHT
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.removal import Amount, Removed, Run
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.store import BlockStore
from layerwise.run.pipeline.targets import Selection
from layerwise.run.pipeline.task import Task
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.run.prune import prune_model
from layerwise.run.settings import CalibrationData, Settings
from tests.support.models import random_tokens, save_checkpoint, tiny_model

DATA: Any = {"calibration": random_tokens(4, 12), "n_sequences": 4, "sequence_length": 12}


@dataclass(frozen=True)
class Halve:
    """Toy that halves the weight of every linear and removes nothing."""

    method: Method
    pattern: ClassVar[Pattern | None] = None
    needs_whole_model: ClassVar[bool] = False
    refused_by_ranks: ClassVar[str | None] = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return ("halve",)

    @classmethod
    def from_arguments(cls, method: Method, amount: Amount) -> "Halve | None":
        return cls(method) if amount.pattern == "halve" else None

    def check_storable(self) -> None: ...

    def for_model(self, model_type: str, *, ours: bool = False) -> "Halve":
        return self

    def select(
        self, opened: OpenedModel, targets: Sequence[str], ignore: Sequence[str]
    ) -> Selection:
        return Selection(opened.model, opened.adapter, targets, ignore)

    def notes(self, run: Run[Selection]) -> list[str]:
        return ["half of everything"]

    def disk_needed(self, run: Run[Selection]) -> int:
        return 0

    def prepare(self, run: Run[Selection]) -> "Halve":
        return replace(self)

    def findings(self, run: Run[Selection]) -> list[str]:
        return []

    def stages_of(self, inputs: BlockInputs) -> tuple[Any, ...]:
        return inputs.stages

    def prune_block(
        self,
        task: Task,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        dense: DenseSide | None = None,
    ) -> PrunedBlock:
        done = PrunedBlock()
        for stage in inputs.stages:
            for name in stage.linears:
                weight = task.adapter.weight(inputs.block, name).mul_(0.5)
                done.weights[name] = weight.clone()
                done.masks[name] = torch.ones_like(weight, dtype=torch.bool)
                done.records.append(record(f"{inputs.name}.{name}", weight))
                on_layer(done.records[-1])
        return done

    def finish(self, run: Run[Selection], store: BlockStore) -> Removed:
        return Removed(
            masks=run.selection.by_parameter(partial(store.read_tensor, MASK)),
            weights=run.selection.by_parameter(partial(store.read_tensor, WEIGHT)),
        )

    def recipe_fields(self) -> dict[str, Any]:
        return {**self.method.recipe_fields(), "pattern": "halve", "sparsity": 0.0}


def record(name: str, weight: Tensor) -> LayerRecord:
    rows, width = weight.shape
    return LayerRecord(
        name=name,
        shape=(rows, width),
        method="toy",
        pattern="halve",
        sparsity=0.0,
        relative_error=0.5,
        status="feasible",
        certificate=None,
        certificate_kind=None,
        damping=0.0,
        damping_raised=False,
        rank=width,
        dead_channels=0,
        n_tokens=0,
        iterations=0,
        seconds=0.0,
    )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMOVALS", (Halve, *module.REMOVALS))


@pytest.mark.usefixtures("toy")
def test_a_third_kind_is_one_class(tmp_path: Path) -> None:
    """In place, and streamed from one folder into another."""
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.named_parameters()}
    report = prune_model(model, "magnitude", pattern="halve", **DATA)
    for name, value in model.named_parameters():
        factor = 0.5 if name in report.masks else 1.0
        assert torch.equal(value, before[name] * factor), name
    source = save_checkpoint(tmp_path / "model", tiny_model("llama"))
    out = tmp_path / "out"
    written = prune_model(source, "magnitude", pattern="halve", output_dir=out, **DATA)
    assert set(written.masks) == set(report.masks)
    for name, value in written.model.named_parameters():
        assert torch.equal(value, model.get_parameter(name)), name
    assert all(check.holds for check in verify(out))
    recipe = Recipe.read(out / "recipe.yaml")
    assert isinstance(Settings.of(**recipe.arguments()).removal, Halve)


@pytest.mark.usefixtures("toy")
def test_two_kinds_do_not_mix(tmp_path: Path) -> None:
    """An interrupted run of one kind is not continued by a run of another kind."""
    source = save_checkpoint(tmp_path / "model", tiny_model("llama"))

    class Stop:
        def on_start(self, n_layers: int) -> None: ...

        def on_layer(self, record: LayerRecord) -> None:
            if ".layers.1." in record.name:
                raise KeyboardInterrupt

        def on_finish(self, report: Any) -> None: ...

    shared: Any = {"output_dir": tmp_path / "out", **DATA}
    with pytest.raises(KeyboardInterrupt):
        prune_model(source, "magnitude", pattern="halve", callbacks=[Stop()], **shared)
    with pytest.raises(UsageError, match=r"unfinished run with another .*pattern"):
        prune_model(source, "magnitude", 0.0, **shared)


def test_a_misspelt_kind_is_named() -> None:
    with pytest.raises(UsageError, match=r"pattern is columns, heads, .*got 'colums'"):
        Settings.of("columns", 0.3, "colums")


def test_the_kind_follows_from_the_arguments() -> None:
    def kind(*arguments: Any, **named: Any) -> type:
        return type(Settings.of(*arguments, **named).removal)

    assert kind("wanda", 0.5) is ZeroWeights
    assert kind("wanda", "2:4") is ZeroWeights
    assert kind("wanda", 0.3, "columns") is RemoveChannels
    assert kind("fasp", 0.3) is RemoveChannels
    with pytest.raises(UsageError, match="pattern 'columns' or 'heads'"):
        kind("wanda", 0.5, multiple=4)


def test_settings_have_the_arguments_and_defaults_of_prune_model() -> None:
    elsewhere = {"model_or_path", "tokenizer", "output_dir", "resume", "force", "callbacks"}
    elsewhere |= {"unit"}  # former name of multiple
    ours = dict(inspect.signature(Settings.of).parameters)
    theirs = {
        name: parameter
        for name, parameter in inspect.signature(prune_model).parameters.items()
        if name not in elsewhere
    }
    assert set(ours) == set(theirs)
    for name, parameter in theirs.items():
        if name != "calibration":  # prune_model needs it, a plan does not
            assert ours[name].default == parameter.default, name
    fields = Settings.of(sparsity=0.5)
    assert fields == Settings(fields.removal, CalibrationData(None))


def test_settings_give_the_recipe_back(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "model", tiny_model("opt"))
    asked: list[dict[str, Any]] = [
        {"method": "sparsegpt", "sparsity": "2:4", "options": {"block_size": 4}},
        {"method": "wanda", "sparsity": 0.5, "group": "layer", "damping": 0.1},
        {"method": "fasp", "sparsity": 0.3, "format": "native", "multiple": 2},
        {"method": "columns", "sparsity": 0.2, "pattern": "heads"},
    ]
    opened = open_model(source, streamed=True)
    assert not opened.in_memory
    for arguments in asked:
        settings = Settings.of(**arguments, **DATA).for_model(opened)
        tokens = settings.calibration.windows(opened)
        recipe = settings.recipe(opened.source, tokens)
        again = Settings.of(**recipe.arguments())
        assert again.removal.recipe_fields() == settings.removal.recipe_fields()
        assert again.error_correction == settings.error_correction
        assert recipe == again.recipe(opened.source, tokens)
        for name, value in arguments.items():
            if name != "options":
                assert getattr(recipe, name) == value


def test_the_former_name_of_multiple_works_for_one_release(tmp_path: Path) -> None:
    def recipe(**named: Any) -> Recipe:
        out = tmp_path / "-".join(named)
        source = save_checkpoint(tmp_path / "model", tiny_model("llama"))
        prune_model(source, "fasp", 0.3, output_dir=out, **named, **DATA)
        return Recipe.read(out / "recipe.yaml")

    assert recipe(unit=2).multiple == recipe(multiple=2).multiple == 2
    with pytest.raises(UsageError, match="unit=2 contradicts multiple=4"):
        recipe(unit=2, multiple=4)

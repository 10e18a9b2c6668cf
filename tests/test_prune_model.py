"""prune_model end to end: what is promised of the model and the caller."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layerwise.errors import (
    DataError,
    InvalidProblemError,
    UnsupportedModelError,
    UsageError,
)
from layerwise.patterns import NM, Columns, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.run.models.opening import open_model
from layerwise.run.outputs.recipe import Recipe
from layerwise.run.pipeline import walk
from layerwise.run.pipeline.blocks import advance, advance_dense
from layerwise.run.report import PruneReport
from layerwise.run.settings import Settings
from layerwise.solve import solve
from layerwise.solvers.fista import Fista
from layerwise.solvers.least_squares import LeastSquares
from layerwise.solvers.magnitude import Magnitude
from tests.support.models import (
    FAMILIES,
    POSITIONS,
    VOCABULARY,
    random_tokens,
    save_checkpoint,
    shard_hashes,
    tiny_model,
)
from tests.support.text_runs import LENGTH, by_path, in_memory, sharded_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sharded_llama(tmp_path_factory.mktemp("models") / "llama")


def linear_names(model: nn.Module) -> list[str]:
    named = model.named_modules()
    kinds = (nn.Linear, Conv1D)
    linears = [name for name, module in named if isinstance(module, kinds)]
    return [name for name in linears if name not in ("lm_head", "embed_out")]


# --- the model and its masks -------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_model_object_is_pruned_in_place(family: str) -> None:
    model = tiny_model(family)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    report = in_memory(model)
    assert report.model is model
    assert report.output_dir is None
    pruned = {f"{name}.weight" for name in linear_names(model)}
    assert set(report.masks) == pruned
    assert [f"{record.name}.weight" for record in report.records] == list(report.masks)
    for name, tensor in model.state_dict().items():
        if name not in pruned:
            assert torch.equal(tensor, before[name]), name
            continue
        mask = report.masks[name]
        assert torch.equal(tensor, torch.where(mask, before[name], 0))
        rows = mask.T if family == "gpt2" else mask  # it stores (in, out)
        assert bool(((~rows).sum(dim=1) == rows.shape[1] // 2).all())


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt", "wanda+least-squares"])
@pytest.mark.parametrize(
    ("pattern", "zeros"),
    [
        (Unstructured(0.3), lambda shape: shape[0] * (3 * shape[1] // 10)),
        (Unstructured(0.3, "layer"), lambda shape: 3 * shape[0] * shape[1] // 10),
        (NM(1, 4), lambda shape: shape[0] * shape[1] * 3 // 4),
    ],
    ids=["row", "layer", "1:4"],
)
def test_masks_are_exact(
    method: str, pattern: Pattern, zeros: Callable[[torch.Size], int]
) -> None:
    report = in_memory(method=method, sparsity=None, pattern=pattern)
    for name, mask in report.masks.items():
        weight = report.model.get_parameter(name)
        assert mask.dtype == torch.bool
        assert int((~mask).sum()) == zeros(mask.shape)
        assert pattern.accepts(mask)
        assert not bool(weight[~mask].any())
    sizes = [mask.numel() for mask in report.masks.values()]
    asked = sum(zeros(mask.shape) for mask in report.masks.values()) / sum(sizes)
    assert report.sparsity == pytest.approx(asked)


def test_sparsity_zero_changes_nothing() -> None:
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    report = in_memory(model, "wanda+least-squares", sparsity=0.0)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(bool(mask.all()) for mask in report.masks.values())
    assert report.mean_relative_error == 0


@pytest.mark.parametrize(
    ("mode", "passes"), [("none", 2), ("sequential", 2), ("block", 2), ("full", 4)]
)
def test_blocks_are_advanced_no_further_than_needed(
    monkeypatch: pytest.MonkeyPatch, mode: str, passes: int
) -> None:
    """Of three blocks the last one has no successor."""
    calls: list[str] = []

    def counted(original: Any) -> Any:
        def count(task: Any, inputs: Any, *hidden: Any) -> Any:
            calls.append(inputs.name)
            return original(task, inputs, *hidden)

        return count

    for function in (advance, advance_dense):
        monkeypatch.setattr(walk, function.__name__, counted(function))
    in_memory(tiny_model("llama", layers=3), error_correction=mode)
    assert len(calls) == passes
    assert "model.layers.2" not in calls


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_training_mode_is_given_back(training: bool, fails: bool) -> None:
    model = tiny_model("opt").train(training)
    model.model.decoder.layers[1].eval()  # a module with a mode of its own
    modes = [module.training for module in model.modules()]
    seen: list[bool] = []

    class Watching:
        def solve(self, problem: LayerProblem) -> Any:
            seen.append(any(module.training for module in model.modules()))
            if fails:
                raise ArithmeticError
            return solve(problem, "magnitude")

    try:
        in_memory(model, Watching())
    except ArithmeticError:
        assert fails
    assert seen
    assert not any(seen)
    assert [module.training for module in model.modules()] == modes


ORDER = {
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@pytest.mark.parametrize(("family", "start"), [("opt", "sparsegpt"), ("llama", "wanda")])
def test_published_warm_start_and_order(family: str, start: str, tmp_path: Path) -> None:
    """SparseGPT for OPT and Wanda for LLaMA, unless the user says otherwise."""
    other = "wanda" if start == "sparsegpt" else "sparsegpt"
    source = save_checkpoint(tmp_path / "source", tiny_model(family))
    out = tmp_path / "out"
    report = by_path(source, out, "fista-paper")
    chosen, unlike = (
        in_memory(tiny_model(family), "fista-paper", options={"warm_start": name})
        for name in (start, other)
    )
    assert all(torch.equal(chosen.masks[n], mask) for n, mask in report.masks.items())
    assert any(not torch.equal(unlike.masks[n], m) for n, m in report.masks.items())
    linears = [record.name.rpartition(".")[2] for record in report.records]
    assert linears == 2 * ORDER[family]
    recipe = Recipe.read(out / "recipe.yaml")
    assert recipe.options == {"warm_start": start}
    assert recipe.error_correction == "block"
    again = in_memory(tiny_model(family), recipe.method, options=dict(recipe.options))
    assert all(torch.equal(again.masks[n], mask) for n, mask in report.masks.items())


def test_published_warm_start_is_of_the_named_method_alone() -> None:
    def first_mask(method: str, **options: Any) -> Tensor:
        masks = in_memory(tiny_model("opt"), method, options=options).masks
        return next(iter(masks.values()))

    for own in (Fista(), Fista(name="my own", warm_start=None)):
        settings = Settings.of(own, 0.5)
        opened = open_model(tiny_model("opt"), streamed=False)
        assert settings.for_model(opened) == settings
    in_chain = first_mask("fista-paper+least-squares")
    assert torch.equal(in_chain, first_mask("fista-paper", warm_start="sparsegpt"))
    assert not torch.equal(in_chain, first_mask("fista-paper", warm_start="wanda"))


def test_columns_of_opt_start_from_wanda() -> None:
    report = in_memory(
        tiny_model("opt"),
        "fista-paper",
        sparsity=None,
        pattern=Columns(8),
        ignore=["re:.*fc2"],
    )
    assert all(bool((mask.sum(dim=1) == 8).all()) for mask in report.masks.values())


# --- methods -----------------------------------------------------------------------------


def test_object_with_nothing_but_solve() -> None:
    class Mine:
        def solve(self, problem: LayerProblem) -> Any:
            mask = problem.pattern.mask(problem.weight.abs())
            return SimpleNamespace(weight=torch.where(mask, problem.weight, 0))

    report = in_memory(method=Mine())
    expected = in_memory(method="magnitude")
    assert {record.method for record in report.records} == {"Mine"}
    assert all(torch.equal(m, expected.masks[name]) for name, m in report.masks.items())


def test_configured_solver_and_chain_object(llama: Path, tmp_path: Path) -> None:
    import layerwise

    chain = layerwise.chain(Magnitude(), LeastSquares(method="cg", tolerance=1e-6))
    by_path(llama, tmp_path / "a", chain)
    by_path(
        llama,
        tmp_path / "b",
        "magnitude+least-squares",
        options={"method": "cg", "least-squares.tolerance": 1e-6},
    )
    assert shard_hashes(tmp_path / "a") == shard_hashes(tmp_path / "b")
    options = Recipe.read(tmp_path / "a" / "recipe.yaml").options
    assert options == {"least-squares.method": "cg", "least-squares.tolerance": 1e-6}


def test_chain_refits_the_mask_of_its_first_step() -> None:
    wanda = in_memory(method="wanda", error_correction="none")
    chain = in_memory(method="wanda+least-squares", error_correction="none")
    for name, mask in chain.masks.items():
        assert torch.equal(mask, wanda.masks[name])
    assert chain.mean_relative_error < wanda.mean_relative_error
    assert {record.certificate_kind for record in chain.records} == {"refit"}


def test_options_reach_the_solver() -> None:
    one = in_memory(method="sparsegpt", options={"block_size": 4})
    other = in_memory(method="sparsegpt")
    assert any(not torch.equal(m, other.masks[name]) for name, m in one.masks.items())


def test_damping_reaches_the_problem() -> None:
    report = in_memory(method="wanda+least-squares", damping=0.25)
    assert {record.damping for record in report.records} == {0.25}


# --- calibration -------------------------------------------------------------------------


def test_token_ids_need_no_tokenizer(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("llama"), tokenizer=False)
    tokens = random_tokens(6, LENGTH)
    report = by_path(source, tmp_path / "out", calibration=tokens)
    assert {record.n_tokens for record in report.records} == {tokens.numel()}


def test_token_ids_work_where_the_tokenizer_is_damaged(llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="pass token ids instead"):
        by_path(source, tmp_path / "out")
    by_path(source, tmp_path / "out", calibration=random_tokens(6, LENGTH))


def test_default_length_is_that_of_the_model() -> None:
    report = in_memory(sequence_length=None, n_sequences=3)
    assert {record.n_tokens for record in report.records} == {3 * POSITIONS}


# --- callbacks ---------------------------------------------------------------------------


def test_callbacks_see_the_run_in_order(llama: Path, tmp_path: Path) -> None:
    told: list[Any] = []

    class Listener:
        def on_start(self, n_layers: int) -> None:
            told.append(n_layers)

        def on_layer(self, record: Any) -> None:
            told.append(record)

        def on_finish(self, report: PruneReport) -> None:
            assert (tmp_path / "out" / "layerwise" / "manifest.json").is_file()
            told.append(report)

    report = by_path(llama, tmp_path / "out", callbacks=[Listener()])
    assert told == [len(report.records), *report.records, report]


# --- what is refused, before anything is touched ------------------------------------------

REFUSED: Mapping[str, tuple[dict[str, Any], type[Exception], str]] = {
    "nothing to prune by": ({"sparsity": None}, UsageError, "say how much"),
    "too sparse": ({"sparsity": 1.5}, InvalidProblemError, "[0, 1), got 1.5"),
    "all of it": ({"sparsity": 1}, InvalidProblemError, "[0, 1), got 1"),
    "negative": ({"sparsity": -0.1}, InvalidProblemError, "[0, 1), got -0.1"),
    "not a number": ({"sparsity": float("nan")}, InvalidProblemError, "got nan"),
    "a word": ({"sparsity": "half"}, InvalidProblemError, "got 'half'"),
    "more kept than there are": ({"sparsity": "5:4"}, InvalidProblemError, "got 5:4"),
    "conflict": ({"pattern": "1:4"}, UsageError, "0.5 contradicts the pattern 1:4"),
    "conflict of patterns": (
        {"sparsity": "2:4", "pattern": Unstructured(0.5)},
        UsageError,
        "2:4 contradicts the pattern 0.5",
    ),
    "conflict of groups": (
        {"sparsity": "2:4", "pattern": "4:8"},
        UsageError,
        "2:4 contradicts the pattern 4:8",
    ),
    "no pattern": ({"pattern": 0.5}, UsageError, "got 0.5"),
    "pattern for one width": (
        {"sparsity": None, "pattern": Columns(4)},
        UsageError,
        "cannot be written to a folder",
    ),
    "width": ({"sparsity": "5:10"}, InvalidProblemError, "q_proj: pattern 5:10 needs"),
    "mode": ({"error_correction": "both"}, UsageError, "sequential, block, full"),
    "method": ({"method": "fistaa"}, UsageError, "did you mean fista"),
    "mask": ({"method": "least-squares"}, InvalidProblemError, '"wanda+least-squares"'),
    "no solver": ({"method": 3}, UsageError, "3 is not a solver"),
    "option": ({"options": {"x": 1}}, UsageError, "wanda has no option 'x'"),
    "damping": ({"damping": -1.0}, InvalidProblemError, "damping must be"),
    "length": (
        {"sequence_length": POSITIONS + 1},
        UsageError,
        f"sequence_length {POSITIONS + 1} exceeds the {POSITIONS} positions",
    ),
    "one token": ({"sequence_length": 1}, UsageError, "at least 2 tokens"),
    "no windows": ({"n_sequences": 0}, UsageError, "at least 1 window"),
    "seed": ({"seed": -1}, UsageError, "seed is -1"),
    "targets": ({"targets": "Conv2d"}, UsageError, "'Conv2d' matches nothing"),
    "ignore": ({"ignore": "lm_haed"}, UsageError, "'lm_haed' matches nothing"),
    "device": ({"device": "abacus"}, UsageError, "device 'abacus' cannot be used"),
    "device without data": ({"device": "meta"}, UsageError, "'meta' cannot be used"),
    "no text": ({"calibration": []}, DataError, "empty"),
    "short text": ({"calibration": ["a"]}, DataError, "a window needs 12"),
    "vocabulary": (
        {"calibration": [[0, 1, VOCABULARY] * LENGTH] * 6},
        DataError,
        f"token id {VOCABULARY} at position 2",
    ),
}


@pytest.mark.parametrize(
    ("options", "error", "expected"), REFUSED.values(), ids=list(REFUSED)
)
def test_refused_before_anything_is_touched(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], expected: str
) -> None:
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(error) as caught:
        in_memory(model, **{"output_dir": tmp_path / "out", **options})
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_is_no_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear is not a language model"):
        in_memory(nn.Linear(4, 4))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5, "layer"), "4:8"], ids=str)
def test_pattern_that_agrees_with_the_sparsity_is_taken(pattern: Any) -> None:
    report = in_memory(sparsity=0.5, pattern=pattern)
    assert {record.pattern for record in report.records} == {str(pattern)}

"""Zeros that are there already: they stay, and the pattern holds on top."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.cli import run
from layerwise.errors import UsageError
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured
from layerwise.problem import LayerProblem
from layerwise.run.outputs.output import Manifest
from layerwise.run.outputs.verify import verify
from layerwise.run.pipeline.kept_zeros import holds_at_least, solve_within
from layerwise.run.prune import prune_model
from layerwise.solution import Status
from layerwise.solve import resolve, solve
from tests.support.models import random_tokens, save_checkpoint, tiny_model

TOKENS = random_tokens(6, 12)
DATA: dict[str, Any] = {"calibration": TOKENS, "n_sequences": 6, "sequence_length": 12}
METHODS = (
    "magnitude",
    "wanda",
    "ria",
    "dsnot",
    "sparsegpt",
    "multi-weight",
    "fista",
    "fista-paper",
    "alps",
    "best",
    "frank-wolfe",
    "wanda+least-squares",
    "sparsegpt+least-squares",
)


def problem_with(first: Pattern, second: Pattern, seed: int = 0) -> LayerProblem:
    """A problem whose weight satisfies one pattern and is to satisfy another."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 16, generator=generator)
    mixing = torch.randn(16, 16, generator=generator)
    inputs = mixing @ torch.randn(16, 200, generator=generator)
    weight = weight * first.mask(torch.rand(12, 16, generator=generator))
    return LayerProblem.from_inputs(weight, inputs, pattern=second)


PATTERNS: dict[str, tuple[Pattern, Pattern]] = {
    "70 % then 2:4": (Unstructured(0.7), NM(2, 4)),
    "2:4 then 70 %": (NM(2, 4), Unstructured(0.7)),
    "50 % then 2:4": (Unstructured(0.5), NM(2, 4)),
    "50 % then 30 %": (Unstructured(0.5), Unstructured(0.3)),
    "layer": (Unstructured(0.4, "layer"), Unstructured(0.6, "layer")),
    "1:4 then 4:8": (NM(1, 4), NM(4, 8)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PATTERNS)
def test_zeros_stay_and_the_pattern_holds(name: str, method: str) -> None:
    problem = problem_with(*PATTERNS[name])
    found = solve_within(problem, resolve(method))
    assert not bool(found.mask[problem.weight == 0].any())
    assert not bool(found.weight[~found.mask].any())
    assert holds_at_least(problem.pattern, found.mask)
    assert found.status is Status.FEASIBLE
    old = int((problem.weight == 0).sum())
    asked = int((~problem.pattern.mask(torch.rand(12, 16))).sum())
    zeros = int((~found.mask).sum())
    assert zeros >= max(old, asked)
    if name in ("2:4 then 70 %", "layer"):  # every row has room for what is there
        assert zeros == asked
    if name in ("50 % then 30 %", "1:4 then 4:8"):
        assert zeros == old


@pytest.mark.parametrize("method", ["fista", "sparsegpt", "wanda+least-squares"])
def test_weights_are_those_of_the_method_on_the_mask(method: str) -> None:
    problem = problem_with(Unstructured(0.6), NM(2, 4))
    found = solve_within(problem, resolve(method))
    alone = solve(problem.with_pattern(FixedMask(found.mask)), method)
    assert torch.equal(found.weight, alone.weight)
    plain = problem.weight * found.mask
    assert (
        found.relative_error
        < solve(problem.with_pattern(FixedMask(found.mask)), "magnitude").relative_error
    )
    assert not torch.equal(found.weight.to(plain.dtype), plain)


def test_without_zeros_nothing_changes() -> None:
    problem = problem_with(Unstructured(0.0), NM(2, 4))
    found, plain = solve_within(problem, resolve("fista")), solve(problem, "fista")
    assert torch.equal(found.weight, plain.weight)
    assert found.status is plain.status


def test_columns_keep_zeros_too() -> None:
    problem = problem_with(Unstructured(0.3), Columns(8))
    found = solve_within(problem, resolve("columns"))
    assert not bool(found.weight[problem.weight == 0].any())
    assert int(found.mask.any(dim=0).sum()) <= 8


class Dense:
    """A user's solver that knows one pattern only and fills every weight it may."""

    def can_solve(self, problem: LayerProblem) -> bool:
        return isinstance(problem.pattern, NM)

    def solve(self, problem: LayerProblem) -> Any:
        mask = problem.pattern.mask(torch.rand(problem.shape))
        return solve(problem.with_pattern(FixedMask(mask)), "least-squares")


def test_a_solver_without_given_masks_is_refitted() -> None:
    problem = problem_with(Unstructured(0.6), NM(2, 4))
    found = solve_within(problem, resolve(Dense()))
    assert not bool(found.mask[problem.weight == 0].any())
    fixed = problem.with_pattern(FixedMask(found.mask))
    assert torch.equal(found.weight, solve(fixed, "least-squares").weight)


@pytest.mark.parametrize(
    ("mask", "pattern", "holds"),
    [
        ([[1, 1, 0, 0, 0, 0, 0, 0]], NM(2, 4), True),
        ([[1, 1, 1, 0, 0, 0, 0, 0]], NM(2, 4), False),
        ([[1, 1, 1, 0, 0, 0, 0, 0]], Unstructured(0.5), True),
        ([[1, 1, 1, 1, 1, 0, 0, 0]], Unstructured(0.5), False),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], Unstructured(0.5, "layer"), True),
        ([[1, 1, 1, 1], [0, 0, 0, 0]], Unstructured(0.5), False),
    ],
)
def test_at_least_the_zeros_of_a_pattern(
    mask: list[list[int]], pattern: Pattern, holds: bool
) -> None:
    assert holds_at_least(pattern, torch.tensor(mask).bool()) is holds


# --- runs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model, and the same with 60 % zeros."""
    root = tmp_path_factory.mktemp("zeros")
    save_checkpoint(root / "dense", tiny_model("llama"), tokenizer=False)
    prune_model(root / "dense", "wanda", 0.6, output_dir=root / "sparse", **DATA)
    return root


def zeros_of(report: Any) -> dict[str, Tensor]:
    return {name: ~mask for name, mask in report.masks.items()}


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_note(self, text: str) -> None:
        self.texts.append(text)

    def on_start(self, n_layers: int) -> None: ...
    def on_layer(self, record: Any) -> None: ...
    def on_finish(self, report: Any) -> None: ...


@pytest.mark.parametrize("error_correction", ["none", "block"])
def test_a_folder_of_ours_keeps_its_zeros(
    folder: Path, tmp_path: Path, error_correction: Any
) -> None:
    notes, out = Notes(), tmp_path / "out"
    old = zeros_of(prune_model(tiny_model("llama"), "wanda", 0.6, **DATA))
    arguments = {**DATA, "error_correction": error_correction, "callbacks": [notes]}
    report = prune_model(folder / "sparse", "fista", "2:4", output_dir=out, **arguments)
    for name, zeros in zeros_of(report).items():
        assert not bool((old[name] & ~zeros).any())
    assert report.sparsity > 0.6
    assert any("every zero that is there already stays" in text for text in notes.texts)
    assert report.records[0].pattern == "2:4, old zeros kept"
    assert "keep_zeros: true\n" in (out / "recipe.yaml").read_text()
    assert Manifest.read(out).keep_zeros
    checks = verify(out)
    assert all(check.holds for check in checks)
    assert "every mask satisfies the pattern 2:4 or has more zeros" in [
        check.claim for check in checks
    ]


def test_the_choice_can_be_made(folder: Path, tmp_path: Path) -> None:
    filled = prune_model(folder / "sparse", "fista", "2:4", keep_zeros=False, **DATA)
    assert 0.5 <= filled.sparsity < 0.55  # of the 0.5625 that were there
    kept = prune_model(tiny_model("llama"), "wanda", 0.5, keep_zeros=True, **DATA)
    plain = prune_model(tiny_model("llama"), "wanda", 0.5, **DATA)
    assert all(torch.equal(kept.masks[name], plain.masks[name]) for name in plain.masks)
    with pytest.raises(UsageError, match="keep_zeros is for zeros, not for smaller models"):
        prune_model(tiny_model("llama"), "columns", 0.3, keep_zeros=True, **DATA)


def test_a_folder_that_claims_too_many_zeros_is_found_out(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune_model(folder / "sparse", "wanda", 0.3, output_dir=out, **DATA)
    path = out / "layerwise" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "sparsity": "0.9"}))
    failed = [check for check in verify(out) if not check.holds]
    assert [check.claim for check in failed] == [
        "every mask satisfies the pattern 0.9 or has more zeros"
    ]


def test_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(TOKENS.tolist()))
    line = ["prune", str(folder / "sparse"), "--method", "sparsegpt", "--sparsity", "2:4"]
    line += ["--calibration", str(ids), "--n-sequences", "6", "--sequence-length", "12"]
    assert run([*line, "--output", str(tmp_path / "a")]) == 0
    assert "every zero that is there already stays zero" in capsys.readouterr().err
    assert run([*line, "--output", str(tmp_path / "b"), "--no-keep-zeros"]) == 0
    assert "every zero" not in capsys.readouterr().err
    assert not Manifest.read(tmp_path / "b").keep_zeros


@pytest.mark.parametrize("keep_zeros", [True, False])
def test_zeros_that_were_negative_become_positive(keep_zeros: bool) -> None:
    model = tiny_model("llama")
    weight: Tensor = model.model.layers[0].mlp.up_proj.weight
    weight.detach()[:, 2:] = -0.0  # more than are removed, so some are kept
    prune_model(model, "wanda", 0.5, keep_zeros=keep_zeros, **DATA)
    assert bool((weight[:, 2:] == 0).all())
    assert not bool((torch.signbit(weight) & (weight == 0)).any())

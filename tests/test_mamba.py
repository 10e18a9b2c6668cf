"""Mamba: the inputs of every linear, though one of them is never called."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba import modeling_mamba

from layerwise.adapters.selective_scan import fast_scan
from layerwise.errors import InvalidProblemError
from layerwise.moments import even_exponent
from layerwise.patterns import NM
from layerwise.problem import LayerProblem
from layerwise.run.activations.streams import BATCH
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from tests.support.models import RANK, random_tokens, tiny_model, weight_of
from tests.support.pruning import prune_and_record
from tests.support.retraining import pruned_model, retrain
from tests.support.tolerances import FAST_SCAN, MOMENTS

LENGTH = 10
TOKENS = random_tokens(BATCH + 2, LENGTH)
ROUNDING = MOMENTS[torch.float64]
LINEARS = {
    "mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "falcon_mamba": ["in_proj", "x_proj", "dt_proj", "out_proj"],
    "mamba2": ["in_proj", "out_proj"],
}
WITH_TIME_STEPS = ["mamba", "falcon_mamba"]


def time_step_inputs(model: Any, index: int) -> Tensor:
    """Inputs of ``dt_proj`` by the formula of the mixer, shape (rank, tokens)."""
    mixer = model.backbone.layers[index].mixer
    seen: list[Tensor] = []
    handle = mixer.x_proj.register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        for batch in torch.split(TOKENS, BATCH):
            model(batch, use_cache=False)
    handle.remove()
    steps = torch.cat([output[..., :RANK].reshape(-1, RANK) for output in seen])
    if model.config.model_type == "falcon_mamba":
        mean_square = steps.float().square().mean(dim=1, keepdim=True)
        root = torch.rsqrt(mean_square + model.config.mixer_rms_eps)
        steps = (steps.float() * root).to(steps.dtype)
    return steps.double().T


def prune(
    monkeypatch: pytest.MonkeyPatch, model: Any, mode: Any, **options: Any
) -> dict[str, LayerProblem]:
    """Prune in place; the problems that were posed, by layer."""
    options = {"method": "sparsegpt", "calibration": TOKENS, **options}
    return prune_and_record(monkeypatch, model, error_correction=mode, **options)[1]


def stage_by_stage(dense: Any, pruned: Any, mode: str, index: int) -> tuple[Any, Any]:
    """Models that X and Xhat of ``dt_proj`` of a block come from."""
    if mode == "none":
        return dense, dense
    behind = copy.deepcopy(dense)
    if mode != "block":
        for earlier in range(index):
            source = pruned.backbone.layers[earlier].state_dict()
            behind.backbone.layers[earlier].load_state_dict(source)
    if mode == "sequential":
        return behind, behind
    for name in ("in_proj", "x_proj"):
        source = pruned.backbone.layers[index].mixer.get_submodule(name).state_dict()
        behind.backbone.layers[index].mixer.get_submodule(name).load_state_dict(source)
    return dense, behind


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
@pytest.mark.parametrize("family", WITH_TIME_STEPS)
def test_moments_of_the_time_steps(
    family: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family, layers=2, dtype=torch.float64)
    dense = copy.deepcopy(model)
    problems = prune(monkeypatch, model, mode)
    for index in range(2):
        problem = problems[f"backbone.layers.{index}.mixer.dt_proj"]
        one, other = stage_by_stage(dense, model, mode, index)
        inputs, seen = time_step_inputs(one, index), time_step_inputs(other, index)
        n = TOKENS.numel()
        assert problem.moments.n_tokens == n
        gram = seen @ seen.T / n
        scale = 2.0 ** -even_exponent(float(gram.diagonal().mean()))
        assert close(problem.gram, gram * scale)
        assert close(problem.cross_gram, inputs @ seen.T / n * scale)
        outputs = weight_of(dense, f"backbone.layers.{index}.mixer.dt_proj") @ inputs
        assert close(problem.energy, outputs.square().sum(dim=1) / n * scale)


@pytest.mark.parametrize("mode", ERROR_CORRECTIONS)
@pytest.mark.parametrize("family", LINEARS)
def test_dense_and_pruned_agree_where_nothing_is_removed(
    family: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No drift appears from hooks, copies of blocks or the order of stages."""
    model = tiny_model(family, dtype=torch.float64)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    problems = prune(monkeypatch, model, mode, method="wanda", sparsity=0.0)
    names = [name.rpartition(".")[2] for name in problems]
    assert names == 2 * LINEARS[family]
    for name, problem in problems.items():
        cross, gram = problem.cross_gram, problem.gram
        slack = 0 if triangles_agree() else ROUNDING * float(gram.abs().max())
        torch.testing.assert_close(cross, gram, rtol=0, atol=slack, msg=name)
        assert not bool(problem.drift.any()), name
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def triangles_agree() -> bool:
    """Whether this processor rounds a product with the transpose symmetrically."""
    found = []
    for width in (8, 64, 128):
        inputs = torch.randn(2 * width, width, dtype=torch.float64)
        product = inputs.T @ inputs
        found.append(torch.equal(product, product.T))
    return all(found)


def test_the_four_modes_pose_different_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    last = "backbone.layers.1.mixer.dt_proj"
    grams = [
        prune(monkeypatch, tiny_model("mamba"), mode)[last].gram
        for mode in ERROR_CORRECTIONS
    ]
    for i, gram in enumerate(grams):
        assert not any(torch.equal(gram, other) for other in grams[:i])


def test_rank_that_is_no_multiple_of_m_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The width of ``dt_proj`` is the rank of the time steps, often an odd number."""
    model = tiny_model("mamba")
    options: Any = {"method": "wanda", "sparsity": None, "pattern": NM(4, 8)}
    with pytest.raises(InvalidProblemError) as caught:
        prune(monkeypatch, model, "block", **options)
    message = str(caught.value)
    assert message.startswith("backbone.layers.0.mixer.dt_proj: pattern 4:8 needs a width")
    assert "ignore this layer" in message
    problems = prune(monkeypatch, model, "block", ignore="re:.*dt_proj", **options)
    assert len(problems) == 2 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_scan_is_that_of_transformers(dtype: torch.dtype) -> None:
    """The scan that trains Mamba on a CPU, on outputs and on gradients."""
    results = []
    for device in ("meta", "cpu"):  # only on a CPU it takes the place of the other
        model: Any = tiny_model("mamba").to(dtype)
        with fast_scan(model, torch.device(device)):
            output = model(input_ids=random_tokens(2, 12), use_cache=False).logits.float()
        output.square().mean().backward()
        gradient = model.backbone.layers[0].mixer.A_log.grad.float()
        results.append((output.detach(), gradient))
    for found, expected in zip(results[1], results[0], strict=True):
        limit = FAST_SCAN[dtype] * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=limit)
        assert not torch.equal(found, expected) or dtype == torch.bfloat16


def test_fast_scan_leaves_alone_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    original = modeling_mamba.mamba_selective_scan

    def record(*args: Any, **options: Any) -> Any:
        asked.append(options)
        return original(*args, **options)

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", record)
    model: Any = tiny_model("mamba")
    with torch.no_grad(), fast_scan(model, torch.device("cpu")):
        model(input_ids=random_tokens(2, 12), use_cache=False)
        assert not asked
        model(input_ids=random_tokens(2, 12), use_cache=True)
    assert asked
    assert modeling_mamba.mamba_selective_scan is record
    with fast_scan(tiny_model("llama"), torch.device("cpu")):
        assert modeling_mamba.mamba_selective_scan is record


@pytest.mark.parametrize("objective", ["tokens", "block"])
def test_mamba_is_retrained_with_the_fast_scan(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, masks = pruned_model("mamba")
    dense = tiny_model("mamba") if objective == "block" else None

    def refuse(*args: Any, **options: Any) -> None:
        message = "the slow scan"
        raise AssertionError(message)

    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", refuse)
    retrain(model, masks=masks, dense=dense, parameters="norms", objective=objective)

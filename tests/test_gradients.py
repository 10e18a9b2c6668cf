"""Loss gradients of a model: against automatic differentiation, and the model unchanged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from layerwise.adapters.linear import is_linear, is_transposed
from layerwise.demo import model_path
from layerwise.errors import SolveError, UsageError
from layerwise.patterns import Unstructured
from layerwise.problem import LayerProblem
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model
from layerwise.run.pipeline import gradients as gradients_module
from layerwise.run.pipeline import walk as walk_module
from layerwise.run.pipeline.gradients import (
    GradientStatistic,
    gradient_norms,
    required_gradient,
)
from layerwise.run.prune import prune_model
from layerwise.solve import chain, resolve, solve
from layerwise.solvers.gblm import GBLM
from tests.support.models import (
    random_tokens,
    save_checkpoint,
    shard_hashes,
    tiny_model,
    tiny_text,
)
from tests.support.tolerances import GRADIENTS

MEAN = GradientStatistic()
TOKENS = random_tokens(4, 11)


def linears_of(model: nn.Module) -> dict[str, Any]:
    found = {n: m for n, m in model.named_modules() if is_linear(m)}
    return {name: linear for name, linear in found.items() if name != "lm_head"}


def reference(model: Any, tokens: Tensor, norm: Literal["l1", "l2"]) -> dict[str, Tensor]:
    """Mean over sequences by ``torch.autograd.grad`` and the loss of transformers."""
    linears = linears_of(model)
    weights = [linear.weight for linear in linears.values()]
    total = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
    for sequence in tokens:
        loss = model(input_ids=sequence[None], labels=sequence[None], use_cache=False).loss
        for sums, gradient in zip(total, torch.autograd.grad(loss, weights), strict=True):
            sums += gradient.double() ** 2 if norm == "l2" else gradient.double().abs()
    means = [sums / len(tokens) for sums in total]
    if norm == "l2":
        means = [mean.sqrt() for mean in means]
    return {
        name: mean.T if is_transposed(linear) else mean
        for (name, linear), mean in zip(linears.items(), means, strict=True)
    }


def packaged_mamba() -> Any:
    return load_model(Checkpoint.open(model_path("mamba")))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model("llama"),
    "opt": lambda: tiny_model("opt"),
    "qwen3": lambda: tiny_model("qwen3", tied=True),
    "gpt2": lambda: tiny_model("gpt2"),  # stores its weights transposed
    "mamba": packaged_mamba,
}


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_every_sequence(name: str, norm: Literal["l1", "l2"]) -> None:
    model = MODELS[name]()
    found = gradient_norms(model, linears_of(model), TOKENS, GradientStatistic(norm))
    expected = reference(model, TOKENS, norm)
    assert found.keys() == expected.keys()
    for linear, values in found.items():
        assert values.dtype == torch.float32
        assert values.is_contiguous()
        largest = float(expected[linear].max())
        assert largest > 0
        assert float((values - expected[linear]).abs().max()) <= GRADIENTS * largest


def test_one_sequence_has_one_norm() -> None:
    model = tiny_model("llama")
    one, two = (
        gradient_norms(model, linears_of(model), TOKENS[:1], GradientStatistic(norm))
        for norm in ("l1", "l2")
    )
    for name, values in one.items():
        torch.testing.assert_close(two[name], values, rtol=GRADIENTS, atol=0)


@pytest.mark.parametrize(("norm", "grows"), [("l1", 2.0), ("l2", 2**0.5)])
def test_sequences_twice(norm: Literal["l1", "l2"], grows: float) -> None:
    """The mean stays; the sum of the paper grows, and with it the part of the gradient."""
    model = tiny_model("llama")
    twice = torch.cat([TOKENS, TOKENS])
    changed = 0
    for scaling, factor in (("mean", 1.0), ("paper", grows)):
        statistic = GradientStatistic(norm, scaling)  # type: ignore[arg-type]
        solver = GBLM(alpha=30.0, norm=norm, scaling=scaling)  # type: ignore[arg-type]
        before, after = (
            gradient_norms(model, linears_of(model), tokens, statistic)
            for tokens in (TOKENS, twice)
        )
        for name, linear in linears_of(model).items():
            torch.testing.assert_close(
                after[name], factor * before[name], rtol=GRADIENTS, atol=0
            )
            first, second = (
                solve(problem_of(linear, norms[name]), solver).mask
                for norms in (before, after)
            )
            if scaling == "mean":
                assert torch.equal(first, second)
            changed += int((first != second).sum())
    assert changed > 0


def problem_of(linear: nn.Linear, norms: Tensor) -> LayerProblem:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(linear.in_features, 50, generator=generator)
    return LayerProblem.from_inputs(
        linear.weight.detach(), inputs, pattern=Unstructured(0.5), gradient_norm=norms
    )


def test_scaling_of_the_paper() -> None:
    """Sum instead of mean, over the root of the length: see the table of the module."""
    model, count, length = tiny_model("opt"), *TOKENS.shape
    for norm, factor in (("l1", count / length**0.5), ("l2", (count / length) ** 0.5)):
        mean, paper = (
            gradient_norms(
                model,
                linears_of(model),
                TOKENS,
                GradientStatistic(norm, scaling),  # type: ignore[arg-type]
            )
            for scaling in ("mean", "paper")
        )
        for name, values in mean.items():
            torch.testing.assert_close(paper[name], values * factor, rtol=GRADIENTS, atol=0)


# -- the model -------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(fails: bool) -> None:
    model = tiny_model("opt").train()
    parameters = dict(model.named_parameters())
    for index, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(index % 3 != 0)
    own = next(p for p in parameters.values() if p.requires_grad)
    own.grad = torch.full_like(own, 3.0)
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    tokens = TOKENS + 1000 * fails  # out of the vocabulary
    with torch.no_grad():  # gradients are wanted all the same
        try:
            found = gradient_norms(model, linears_of(model), tokens, MEAN)
        except IndexError:
            assert fails
        else:
            assert not fails
            assert all(bool((norms > 0).any()) for norms in found.values())
    assert {n: p.requires_grad for n, p in parameters.items()} == flags
    assert bool((own.grad == 3).all())
    assert [p for p in parameters.values() if p.grad is not None and p is not own] == []
    assert all(module.training for module in model.modules())
    assert not any(vars(p).get("_post_accumulate_grad_hooks") for p in parameters.values())


def test_evaluation_mode() -> None:
    """OPT has dropout: in training mode the gradients would be random."""
    model = tiny_model("opt")
    expected = gradient_norms(model, linears_of(model), TOKENS, MEAN)
    found = gradient_norms(model.train(), linears_of(model), TOKENS, MEAN)
    assert all(torch.equal(found[name], values) for name, values in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    found = gradient_norms(model, linears_of(model), TOKENS, MEAN)
    expected = reference(tiny_model("llama"), TOKENS, "l1")
    for name, norms in found.items():
        assert norms.dtype == torch.float32
        distance = float((norms - expected[name]).norm() / expected[name].norm())
        assert distance < torch.finfo(dtype).eps ** 0.5


def test_small_gradients_survive_in_float16() -> None:
    model = tiny_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.lm_head.weight *= 2e-6  # and with it every gradient
    found = gradient_norms(model, linears_of(model), TOKENS, MEAN)
    assert all(bool((norms > 0).all()) for norms in found.values())


def test_gradients_that_are_not_finite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    with pytest.raises(SolveError, match=r"^model.layers.*: the loss gradient is not"):
        gradient_norms(model, linears_of(model), TOKENS, MEAN)


def test_sequences_of_one_token() -> None:
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="at least 2 tokens"):
        gradient_norms(model, linears_of(model), TOKENS[:, :1], MEAN)


# -- in a run --------------------------------------------------------------------------


def test_who_requires_gradients() -> None:
    assert required_gradient(chain("wanda", "least-squares")) is None
    assert required_gradient(chain("gblm", "least-squares")) == MEAN
    nested = chain(chain("wanda", GBLM(norm="l2", scaling="paper")), "fista")
    assert required_gradient(nested) == GradientStatistic("l2", "paper")

    class Own:
        requires = frozenset({"gradient"})

        def solve(self, problem: Any) -> Any: ...

    assert required_gradient(resolve(Own())) == MEAN
    with pytest.raises(UsageError, match="the same norm and scaling"):
        required_gradient(chain("gblm", GBLM(norm="l2")))


def prune(model: Any, method: Any, **options: Any) -> Any:
    arguments = {"sparsity": 0.5, "calibration": list(TOKENS), "n_sequences": 4}
    return prune_model(model, method, **{**arguments, "sequence_length": 10, **options})


def test_run_hands_every_layer_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    seen: list[LayerProblem] = []

    class Watching:
        requires, norm, scaling = frozenset({"gram", "gradient"}), "l2", "mean"

        def solve(self, problem: LayerProblem) -> Any:
            seen.append(problem)
            return solve(problem, "gblm")

    windows: list[Tensor] = []
    original = gradient_norms

    def watched(model: Any, linears: Any, tokens: Tensor, statistic: Any) -> Any:
        windows.append(tokens)
        return original(model, linears, tokens, statistic)

    monkeypatch.setattr(walk_module, "gradient_norms", watched)
    report = prune(model, Watching(), ignore=["re:.*up_proj"])
    expected = reference(tiny_model("llama"), windows[0], "l2")  # dense in every block
    assert len(seen) == len(report.records) == 12
    for record, problem in zip(report.records, seen, strict=True):
        norms = expected[record.name]
        assert problem.gradient_norm is not None
        scale = float((problem.gradient_norm / norms)[norms > 0].median())
        distance = float((problem.gradient_norm - scale * norms).abs().max())
        assert distance <= GRADIENTS * scale * float(norms.max())
        assert torch.log2(torch.tensor(scale)) == pytest.approx(
            round(float(torch.log2(torch.tensor(scale)))), abs=GRADIENTS
        )


@pytest.mark.parametrize("name", ["gpt2", "mamba"])
def test_run_on_weights_that_are_stored_or_used_otherwise(name: str) -> None:
    report = prune(MODELS[name](), "gblm", options={"norm": "l2"})
    assert all(bool((~mask).any()) for mask in report.masks.values())
    assert report.sparsity == pytest.approx(0.5, abs=0.05)


def test_other_methods_spend_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(walk_module, "gradient_norms", never)
    prune(tiny_model("llama"), "wanda+least-squares")
    with pytest.raises(AssertionError):
        prune(tiny_model("llama"), "gblm+least-squares")


def test_chain_and_options_reach_the_pass() -> None:
    alone = prune(tiny_model("opt"), "gblm", options={"alpha": 100.0})
    chained = prune(tiny_model("opt"), "gblm+least-squares", options={"alpha": 100.0})
    first = next(iter(alone.masks))
    assert torch.equal(alone.masks[first], chained.masks[first])
    squared = prune(tiny_model("opt"), "gblm", options={"alpha": 100.0, "norm": "l2"})
    assert not torch.equal(alone.masks[first], squared.masks[first])
    assert all(p.grad is None and p.requires_grad for p in alone.model.parameters())


class Killed(BaseException):
    """Stands for the end of the process."""


class KillInSecondBlock:
    def on_start(self, n_layers: int) -> None:
        return

    def on_finish(self, report: Any) -> None:
        return

    def on_layer(self, record: Any) -> None:
        if record.name == "model.layers.1.self_attn.o_proj":
            raise Killed


def test_resumed_run_has_the_same_bytes(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", tiny_model("qwen2"))
    settings = {"calibration": [tiny_text()], "options": {"alpha": 50.0}}
    prune(source, "gblm", output_dir=tmp_path / "whole", **settings)
    with pytest.raises(Killed):
        prune(
            source,
            "gblm",
            output_dir=tmp_path / "out",
            callbacks=[KillInSecondBlock()],
            **settings,
        )
    assert (tmp_path / "out.partial").is_dir()
    prune(source, "gblm", output_dir=tmp_path / "out", **settings)
    assert shard_hashes(tmp_path / "out") == shard_hashes(tmp_path / "whole")


def test_loss_scale_of_float16_is_a_power_of_two() -> None:
    """So that it changes no bit of a gradient that neither overflows nor underflows."""
    mantissa, _ = torch.frexp(torch.tensor(gradients_module.FLOAT16_LOSS_SCALE))
    assert mantissa == 0.5

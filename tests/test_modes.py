"""Autocast and inference mode around a call change nothing of its result."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import UsageError
from layerwise.evaluate import objective_rows
from layerwise.modes import in_ordinary_mode, without_autocast
from layerwise.patterns import Unstructured
from layerwise.run.data.perplexity import perplexity
from layerwise.run.prune import prune_model
from layerwise.solvers.lasso import lasso
from tests.support.models import random_tokens, tiny_model
from tests.support.problems import make_layer

TOKENS = random_tokens(4, 16)


@contextmanager
def nested() -> Iterator[None]:
    outer = torch.autocast("cpu", torch.bfloat16)
    with outer, torch.inference_mode(), torch.autocast("cpu", torch.float16):
        yield


AUTOCASTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16": lambda: torch.autocast("cpu", torch.float16),
    "nested": nested,
}


def pruned(context: AbstractContextManager[Any], method: str, **more: Any) -> list[Any]:
    model = tiny_model("llama")
    with context:
        report = prune_model(
            model,
            method,
            0.5,
            calibration=TOKENS,
            n_sequences=4,
            sequence_length=16,
            **more,
        )
        score = perplexity(model, TOKENS.flatten(), sequence_length=16)
    errors = [record.relative_error for record in report.records]
    return [errors, score, *(p.detach().clone() for p in model.parameters())]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize(
    ("method", "kind"),
    [("sparsegpt", "float16"), ("fista", "bfloat16"), ("gblm", "nested")],
)
def test_a_run_inside_is_the_run_outside(method: str, kind: str) -> None:
    outside = pruned(nullcontext(), method, error_correction="full")
    inside = pruned(AUTOCASTS[kind](), method, error_correction="full")
    assert all(same(a, b) for a, b in zip(outside, inside, strict=True))


def figures() -> list[Any]:
    layer = make_layer(41, drift=0.2).to(torch.float32)
    problem = layer.problem(Unstructured(0.5))
    found: list[Any] = [problem.gram, problem.energy, problem.drift, problem.factor().lower]
    for solver in ("wanda", "sparsegpt", "fista", "fista-paper", "alps", "least-squares"):
        method = "wanda+least-squares" if solver == "least-squares" else solver
        solution = lw.solve(problem, method)
        found += [solution.weight, solution.objective]
    found.append(lw.lower_bounds(problem))
    found.append(lasso(problem, 0.1).weight)
    return [*found, objective_rows(problem, layer.weight / 2)]


@pytest.mark.parametrize("kind", AUTOCASTS)
def test_a_problem_inside_is_the_problem_outside(kind: str) -> None:
    outside = figures()
    with AUTOCASTS[kind]():
        inside = figures()
    assert all(same(a, b) for a, b in zip(outside, inside, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_type_changes_nothing(dtype: torch.dtype) -> None:
    outside = figures()
    torch.set_default_dtype(dtype)
    try:
        inside = figures()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same(a, b) for a, b in zip(outside, inside, strict=True))


def test_modes_are_as_before_afterwards() -> None:
    with torch.autocast("cpu", torch.float16):
        with without_autocast():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.float16


def test_a_model_made_in_inference_mode_stays_there() -> None:
    @in_ordinary_mode
    def modes(model: nn.Module) -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")

    outside = nn.Linear(2, 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert modes(nn.Linear(2, 2)) == (True, False)
        assert modes(outside) == (False, False)
        assert torch.is_inference_mode_enabled()


def test_gradients_of_a_model_made_in_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
        with pytest.raises(UsageError, match=r"not loaded in torch\.inference_mode"):
            prune_model(
                model, "gblm", 0.5, calibration=TOKENS, n_sequences=4, sequence_length=16
            )

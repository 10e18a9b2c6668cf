"""One judgement of every weight, the same for a run and for its plan."""

from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from layerwise.adapters import Adapter
from layerwise.patterns import NM, Pattern, Unstructured
from layerwise.run.models.architecture import adapter_of
from layerwise.run.pipeline.judgement import Judgement, Verdict
from layerwise.run.pipeline.targets import Selection
from tests.support.models import blocks_of, mixture_of_experts, tiny_model

BLOCK = "model.layers.0"
EXPERTS = f"{BLOCK}.mlp.experts"
HALF = Unstructured(0.5)


def judgement(
    model: Any,
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = (),
    pattern: Pattern = HALF,
    adapter: Adapter | None = None,
) -> Judgement:
    return Judgement(model, adapter or adapter_of(model), targets, ignore, pattern)


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        (["Linear"], ["lm_head"]),
        (["Linear"], ["re:.*mlp"]),
        (["re:.*_proj"], [f"{BLOCK}.mlp.up_proj"]),
        ([f"{BLOCK}.mlp.up_proj"], []),
    ],
)
def test_a_run_prunes_what_is_judged_so(targets: list[str], ignore: list[str]) -> None:
    model = tiny_model("llama")
    chosen = Selection(model, adapter_of(model), targets, ignore, HALF).names
    judged = judgement(model, targets, ignore)
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    pruned = [name for name in names if judged.of_parameter(name).status == "pruned"]
    assert sorted(pruned) == sorted(f"{name}.weight" for name in chosen)
    assert [name for name in judged.candidates if name in chosen] == chosen


def test_reasons_of_weights_that_stay_dense() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.extra = nn.Linear(4, 4)
    model.model.layers[0].mlp.table = nn.Embedding(4, 4)
    judged = judgement(model, ["re:.*mlp"], ["re:.*up_proj"])
    expected = {
        "lm_head.weight": "outside the decoder blocks",
        f"{BLOCK}.input_layernorm.weight": "a vector",
        f"{BLOCK}.mlp.up_proj.weight": "ignored by 're:.*up_proj'",
        f"{BLOCK}.self_attn.q_proj.weight": "not in targets",
        f"{BLOCK}.mlp.extra.weight": "not declared by the LLaMA adapter",
        f"{BLOCK}.mlp.table.weight": "not a linear layer",
    }
    for name, reason in expected.items():
        assert judged.of_parameter(name) == Verdict("dense", reason)


def test_a_view_is_shared_like_the_tensor_itself() -> None:
    model = tiny_model("llama")
    first, last = blocks_of(model)
    last.mlp.up_proj.weight = nn.Parameter(first.mlp.up_proj.weight.detach())
    one, other = f"{BLOCK}.mlp.up_proj", "model.layers.1.mlp.up_proj"
    judged = judgement(model)
    for name, shown in ((one, other), (other, one)):
        reason = f"shared with {shown}.weight; ignore both"
        assert judged.of_linear(name) == Verdict("refused", reason)
        assert judged.first_name(f"{name}.weight") == f"{one}.weight"
    ignored = judgement(model, ignore=["re:.*up_proj"]).of_linear(other)
    assert ignored == Verdict("dense", "ignored by 're:.*up_proj'")


def test_a_pattern_that_does_not_fit_refuses_with_its_own_words() -> None:
    verdict = judgement(tiny_model("llama", inner=18), pattern=NM(2, 4)).of_linear(
        f"{BLOCK}.mlp.down_proj"
    )
    assert verdict.status == "refused"
    assert verdict.reason.startswith("pattern 2:4 needs")


@pytest.mark.parametrize(
    ("targets", "ignore", "status", "end"),
    [
        (["Linear"], [], "refused", ""),
        (["Linear"], [EXPERTS], "dense", f"; ignored by '{EXPERTS}'"),  # that holds it
        (["Linear"], [f"{EXPERTS}.gate_up_proj"], "dense", "gate_up_proj'"),
        (["Linear"], ["Linear"], "dense", "; ignored by 'Linear'"),
        (["re:.*q_proj"], [], "dense", "; not in targets"),
    ],
)
def test_weights_that_cannot_be_served(
    targets: list[str], ignore: list[str], status: str, end: str
) -> None:
    model = mixture_of_experts()
    adapter = adapter_of(model)
    name = f"{EXPERTS}.gate_up_proj"
    judged = judgement(model, targets, ignore, adapter=adapter)
    verdict = judged.of_parameter(name)
    assert verdict == judged.of_unserved(name)
    assert verdict.status == status
    assert verdict.reason.startswith(adapter.unserved[name])
    assert verdict.reason.endswith(end)
    assert (verdict.reason == adapter.unserved[name]) == (status == "refused")

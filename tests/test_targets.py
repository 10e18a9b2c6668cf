"""Targets: which linears are pruned, and an answer for every entry that matches none."""

import pytest
import torch

from layerwise.adapters import get_adapter
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.patterns import NM, Unstructured
from layerwise.run.targets import Selection
from tests.models import INNER, tiny_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
NAMES = [
    f"model.layers.{index}.{part}.{name}"
    for index in range(2)
    for part, names in (("self_attn", ATTENTION), ("mlp", MLP))
    for name in names
]


def selection(targets: list[str], ignore: list[str], pattern: object = None) -> Selection:
    model = tiny_model("llama")
    chosen = pattern if isinstance(pattern, NM) else Unstructured(0.5)
    return Selection(model, get_adapter("llama"), targets, ignore, chosen)


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["Linear"], ["lm_head"], NAMES),
        (["Linear"], [], NAMES),
        ([NAMES[3]], [], [NAMES[3]]),
        ([NAMES[8], NAMES[3]], [], [NAMES[3], NAMES[8]]),
        ([r"re:.*\.1\..*_proj"], [], NAMES[7:]),
        (["re:model"], [r"re:.*self_attn"], [name for name in NAMES if "mlp" in name]),
        (["Linear"], [NAMES[0]], NAMES[1:]),
        (["Linear"], ["re:.*_proj"], []),
        (["re:.*q_proj", "re:.*k_proj"], [], [n for n in NAMES if n[-6] in "qk"]),
        (
            ["Linear"],
            ["lm_head", "LlamaMLP", "re:.*mlp"],
            [n for n in NAMES if "self" in n],
        ),
    ],
)
def test_chosen_names(targets: list[str], ignore: list[str], expected: list[str]) -> None:
    if not expected:
        with pytest.raises(UsageError, match="nothing is left to prune"):
            selection(targets, ignore)
        return
    assert selection(targets, ignore).names == expected


@pytest.mark.parametrize(
    ("targets", "ignore", "expected"),
    [
        (["Conv1D"], [], "targets entry 'Conv1D' matches nothing in model.layers.0"),
        (["linear"], [], "(class Linear)"),
        ([NAMES[0], "q_proj"], [], "targets entry 'q_proj' matches nothing"),
        (["model.layers.0.self_attn.q_prj"], [], "close: model.layers.0.self_attn.q_proj"),
        (["re:layers"], [], "'re:layers' matches nothing"),  # from the start of the name
        (["lm_head"], [], "'lm_head' matches nothing"),  # lies in no block
        (["Linear"], ["re:lm_haed"], "ignore entry 're:lm_haed' matches nothing"),
        (["Linear"], ["k_proj"], "ignore entry 'k_proj' matches nothing"),
        (["Linear"], ["Linear"], "nothing is left to prune: ignore=['Linear']"),
        (["re:("], [], "'re:(' is no regular expression"),
        (["Linear"], ["re:["], "'re:[' is no regular expression"),
        ([], [], "nothing is left to prune"),
    ],
)
def test_entries_that_match_nothing(
    targets: list[str], ignore: list[str], expected: str
) -> None:
    with pytest.raises(UsageError) as caught:
        selection(targets, ignore)
    message = str(caught.value)
    assert expected in message
    assert "\n" not in message


def test_listing_is_short() -> None:
    with pytest.raises(UsageError) as caught:
        selection(["Nothing"], [])
    message = str(caught.value)
    assert "and 6 more" in message
    assert NAMES[8] not in message


def test_an_entry_to_ignore_may_lie_outside_the_blocks() -> None:
    assert selection(["Linear"], ["model.embed_tokens", "LlamaRMSNorm"]).names == NAMES


def test_the_default_to_ignore_need_not_exist() -> None:
    model = tiny_model("llama")
    del model.lm_head
    adapter, pattern = get_adapter("llama"), Unstructured(0.5)
    assert Selection(model, adapter, ["Linear"], ["lm_head"], pattern).names == NAMES


def test_only_the_chosen_are_checked_against_the_pattern() -> None:
    pattern = NM(INNER // 2, INNER)  # fits the inner width alone
    with pytest.raises(InvalidProblemError, match=r"^model\.layers\.0\.self_attn\.q_proj:"):
        selection(["Linear"], [], pattern)
    chosen = selection(["re:.*down_proj"], [], pattern)
    assert chosen.names == [name for name in NAMES if "down_proj" in name]


def test_targets_of_a_block_are_relative_to_it() -> None:
    chosen = selection(["re:.*layers.1.*v_proj", "re:.*down_proj"], [])
    assert chosen.targets_of("model.layers.0") == {"mlp.down_proj"}
    assert chosen.targets_of("model.layers.1") == {"self_attn.v_proj", "mlp.down_proj"}
    assert chosen.targets_of("model.layers.11") == set()


def test_tensors_by_parameter_are_in_the_order_of_the_names() -> None:
    chosen = selection(["re:.*[qv]_proj"], [])
    q, v = torch.zeros(1), torch.ones(1)
    parts = [{"self_attn.v_proj": v, "self_attn.q_proj": q}] * 2
    found = chosen.by_parameter(parts)
    assert list(found) == [f"{name}.weight" for name in chosen.names]
    assert [int(tensor) for tensor in found.values()] == [0, 1, 0, 1]

"""Targets: which linears are pruned, and an answer for every entry that matches none."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.adapters import Stage, get_adapter
from layerwise.errors import InvalidProblemError, UnsupportedModelError, UsageError
from layerwise.patterns import NM, Unstructured
from layerwise.run.models.architecture import adapter_of
from layerwise.run.pipeline.targets import Selection, note_on
from tests.support.models import INNER, WIDTH, blocks_of, tiny_model

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
        (["re:("], [], "'re:(' is not a regular expression"),
        (["Linear"], ["re:["], "'re:[' is not a regular expression"),
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


def test_stages_of_a_block_hold_the_chosen_alone() -> None:
    chosen = selection(["re:.*layers.1.*[kv]_proj", "re:.*down_proj"], [])
    down = Stage(("mlp.down_proj",))
    assert chosen.stages_of("model.layers.0") == (down,)
    keys_and_values = Stage(("self_attn.k_proj", "self_attn.v_proj"))
    assert chosen.stages_of("model.layers.1") == (keys_and_values, down)
    assert chosen.stages_of("model.layers.11") == ()


@pytest.mark.parametrize("entry", ["Linear", "Conv1D", r"re:.*c_(attn|proj|fc)"])
def test_layers_that_are_stored_transposed_are_linear(entry: str) -> None:
    model = tiny_model("gpt2")
    adapter, pattern = adapter_of(model), NM(2, 4)
    chosen = Selection(model, adapter, [entry], ["lm_head"], pattern)
    assert len(chosen.names) == 8
    assert chosen.transposed == set(chosen.names)
    with pytest.raises(UsageError, match="nothing is left to prune"):
        Selection(model, adapter, ["Linear"], [entry], pattern)


def test_share_of_the_parameters() -> None:
    model = tiny_model("llama")
    chosen = selection(["re:.*up_proj"], [])
    total = sum(p.numel() for block in blocks_of(model) for p in block.parameters())
    share = 2 * INNER * WIDTH / total
    assert f"hold {share:.1%} of" in note_on(model, get_adapter("llama"), chosen)


def share_between_blocks(model: Any) -> None:
    first, last = blocks_of(model)
    last.mlp.up_proj.weight = first.mlp.up_proj.weight


def share_inside_a_block(model: Any) -> None:
    blocks_of(model)[0].mlp.up_proj.weight = blocks_of(model)[0].mlp.gate_proj.weight


def share_the_block(model: Any) -> None:
    model.model.layers[1] = model.model.layers[0]


def share_with_a_view(model: Any) -> None:
    first, last = blocks_of(model)
    last.mlp.up_proj.weight = nn.Parameter(first.mlp.up_proj.weight.detach())


@pytest.mark.parametrize(
    "share",
    [share_between_blocks, share_inside_a_block, share_the_block, share_with_a_view],
)
def test_shared_weights_are_refused_unless_ignored(share: Callable[[Any], None]) -> None:
    model = tiny_model("llama")
    share(model)
    adapter, pattern = get_adapter("llama"), Unstructured(0.5)
    with pytest.raises(UnsupportedModelError) as caught:
        Selection(model, adapter, ["Linear"], [], pattern)
    message = str(caught.value)
    assert "(one tensor with model.layers." in message
    ignore = message.rpartition("ignore ")[2].split()
    if share is not share_the_block:  # what the message says, does
        assert Selection(model, adapter, ["Linear"], ignore, pattern).names
        return
    assert message.startswith("14 weights of the blocks, 98.4%")
    with pytest.raises(UsageError, match="nothing is left to prune"):
        Selection(model, adapter, ["Linear"], ignore, pattern)


def test_tensors_by_parameter_are_in_the_order_of_the_names() -> None:
    chosen = selection(["re:.*[qv]_proj"], [])
    q, v = torch.zeros(1), torch.ones(1)
    parts = [{"self_attn.v_proj": v, "self_attn.q_proj": q}] * 2
    found = chosen.by_parameter(lambda index, linear: parts[index][linear])
    assert list(found) == [f"{name}.weight" for name in chosen.names]
    assert [int(tensor) for tensor in found.values()] == [0, 1, 0, 1]

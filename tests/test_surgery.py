"""Surgery: the smaller model computes what the masked model computes."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from layerwise.adapters import Adapter, get_adapter, get_coupling
from layerwise.errors import UnsupportedModelError, UsageError
from layerwise.run.models.stock import Format, check_format, holds_width
from layerwise.run.models.surgery import Cut, shrink, steps_of
from tests.support.cutting import (
    COUPLED,
    EACH,
    PACKAGED,
    STOCK,
    distance,
    evenly,
    exact_logits_of,
    logits_of,
    masked,
    model_of,
    names_of,
    random_cuts,
    size_of,
    state_of,
)
from tests.support.models import mixture_of_experts, random_tokens, tiny_model
from tests.support.tolerances import SURGERY


def stock_names(family: str) -> list[str]:
    return [n for f, n in STOCK if f == family.removeprefix("demo-")]


NATIVE_CASES = [
    *((family, [name]) for family, name in EACH),
    *((family, names_of(family)) for family in (*COUPLED, *PACKAGED)),
]
STOCK_CASES = [
    *((family, [name]) for family, name in STOCK),
    *((family, stock_names(family)) for family in (*COUPLED, *PACKAGED)),
]


@pytest.mark.parametrize(("family", "names"), NATIVE_CASES)
def test_native_models_compute_what_the_masked_model_does(
    family: str, names: Sequence[str]
) -> None:
    model, adapter = model_of(family)
    dense = size_of(model)
    cuts = random_cuts(model, adapter, names)
    expected = exact_logits_of(masked(model, adapter, cuts))
    assert distance(expected, exact_logits_of(model)) > 10 * SURGERY
    shrink(model, adapter, cuts, format="native")
    assert distance(exact_logits_of(model), expected) <= SURGERY
    assert size_of(model) < dense


@pytest.mark.parametrize(("family", "names"), STOCK_CASES)
def test_stock_models_are_opened_by_transformers(
    family: str, names: Sequence[str], tmp_path: Path
) -> None:
    model, adapter = model_of(family)
    cuts = random_cuts(model, adapter, names, uniform=True)
    expected = exact_logits_of(masked(model, adapter, cuts))
    shrink(model, adapter, cuts)
    assert distance(exact_logits_of(model), expected) <= SURGERY
    model.save_pretrained(tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    opened, report = loaded
    assert not any(report[key] for key in report)
    assert torch.equal(logits_of(opened), logits_of(model))
    assert {n: p.shape for n, p in opened.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    assert steps_of(model) == []


@pytest.mark.parametrize(("family", "name"), EACH)
def test_parameters_leave_as_counted(family: str, name: str) -> None:
    model, adapter = model_of(family)
    cuts = random_cuts(model, adapter, [name])
    expected = size_of(model)
    for cut in cuts:
        channels = get_coupling(adapter, name).resolve(model.get_submodule(cut.block))
        expected -= channels.cost * (channels.units - len(cut.kept))
    shrink(model, adapter, cuts, format="native")
    assert size_of(model) == expected


@pytest.mark.parametrize("family", COUPLED)
def test_what_remains_keeps_its_bits(family: str) -> None:
    model, adapter = model_of(family, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() > 1)
    original = copy.deepcopy(model)
    cuts = random_cuts(model, adapter, names_of(family))
    kept: dict[str, dict[int, Tensor]] = {}
    for cut in cuts:
        block = original.get_submodule(cut.block)
        stays = get_coupling(adapter, cut.coupling).resolve(block).stays(cut.kept)
        for name, (axis, mask) in stays.items():
            axes = kept.setdefault(f"{cut.block}.{name}", {})
            axes[axis] = axes.get(axis, torch.ones_like(mask)) & mask
    shrink(model, adapter, cuts, format="native")
    assert dict(model.named_parameters()).keys() == dict(original.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        expected = original.get_parameter(name)
        for axis, mask in kept.get(name, {}).items():
            expected = expected.movedim(axis, 0)[mask].movedim(0, axis)
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected)
        assert parameter.requires_grad == original.get_parameter(name).requires_grad
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 2
    for name, module in model.named_modules():
        assert not module.training, name
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        if isinstance(module, nn.Conv1d):
            assert module.groups == module.in_channels == len(module.weight)


@torch.no_grad()
def decode(model: Any, tokens: Tensor) -> Tensor:
    """Logits of every position, token by token with a cache."""
    cache, found = None, []
    for position in range(tokens.shape[1]):
        output = model(tokens[:, position : position + 1], use_cache=True, **(cache or {}))
        key = "past_key_values" if "past_key_values" in output else "cache_params"
        cache = {key: output[key]}
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("format", ["stock", "native"])
@pytest.mark.parametrize("family", COUPLED)
def test_decoding_agrees_with_the_full_pass(family: str, format: Format) -> None:
    model, adapter = model_of(family)
    uniform = format == "stock"
    names = stock_names(family) if uniform else names_of(family)
    shrink(model, adapter, random_cuts(model, adapter, names, uniform=uniform), format)
    full = logits_of(model)
    tokens = random_tokens(2, 9)
    assert distance(decode(model, tokens), full) <= SURGERY
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    words = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    assert words.shape == (2, 12)
    with torch.no_grad():
        following = model(words, use_cache=False).logits[:, 8:-1]
    following[..., 0] = -torch.inf  # the end of the text is not allowed so soon
    assert torch.equal(words[:, 9:], following.argmax(dim=-1))


def test_attention_kernels_agree_on_narrow_values() -> None:
    model, adapter = model_of("llama")
    shrink(model, adapter, random_cuts(model, adapter, ["heads", "values"]), "native")
    expected = logits_of(model)
    model.set_attn_implementation("eager")
    assert distance(logits_of(model), expected) <= SURGERY


def test_narrow_values_have_gradients() -> None:
    model, adapter = model_of("llama")
    shrink(model, adapter, random_cuts(model, adapter, ["values"]), "native")
    model(random_tokens(2, 9), labels=random_tokens(2, 9)).loss.backward()
    for linear in ("v_proj", "o_proj"):
        gradient = model.get_parameter(f"model.layers.1.self_attn.{linear}.weight").grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 0


def test_cutting_twice_is_cutting_once() -> None:
    once, adapter = model_of("llama")
    twice = copy.deepcopy(once)
    name = "model.layers.1"
    shrink(once, adapter, [Cut(name, "mlp", torch.tensor([1, 7, 20]))], "native")
    shrink(twice, adapter, [Cut(name, "mlp", torch.tensor([1, 3, 7, 20]))], "native")
    shrink(twice, adapter, [Cut(name, "mlp", torch.tensor([0, 2, 3]))], "native")
    assert torch.equal(logits_of(once), logits_of(twice))
    assert [step[name]["mlp"] for step in steps_of(twice)] == [[1, 3, 7, 20], [0, 2, 3]]
    shrink(twice, adapter, evenly(adapter, twice, "mlp", 3))
    assert twice.config.intermediate_size == 3
    assert steps_of(twice) == []


def test_what_is_not_cut_keeps_its_configuration() -> None:
    model, adapter = model_of("qwen2")
    before = model.config.to_dict()
    shrink(model, adapter, evenly(adapter, model, "mlp", 7))
    after = model.config.to_dict()
    assert {name for name in after if after[name] != before.get(name)} == {
        "intermediate_size"
    }


def test_heads_state_their_size() -> None:
    """Otherwise transformers would compute it from the hidden size."""
    model, adapter = model_of("qwen2")
    shrink(model, adapter, evenly(adapter, model, "heads", 1))
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert config.head_dim == 4


# -- what is refused -------------------------------------------------------------------


A, B = "model.layers.0", "model.layers.1"
ALL_BLOCKS = (A, B, "model.layers.2")


def cut(block: str, name: str, *kept: int) -> Cut:
    return Cut(block, name, torch.tensor(kept, dtype=torch.long))


@pytest.mark.parametrize(
    ("cuts", "format", "expected"),
    [
        (
            [cut(A, "mlp", 1, 2)],
            "stock",
            "keep the same number, choose format 'native', or pad",
        ),
        ([cut(A, "mlp", 1, 2)], "stock", f"{A} would keep 2 units of 'mlp' and {B} 24"),
        (
            [cut(A, "values", 1, 5)],
            "stock",
            "no place for fewer 'values': choose format 'nat",
        ),
        ([cut(A, "mlp", 1)], "safetensors", "choose one of stock, native"),
        (
            [cut("model.layers.7", "mlp", 1)],
            "native",
            "choose one of model.layers.0, model",
        ),
        ([cut(A, "mlp", 1), cut(A, "mlp", 2)], "native", "two cuts of 'mlp'"),
        ([cut(A, "mlp")], "native", "must keep at least one unit"),
        ([cut(A, "mlp", 3, 1)], "native", "give increasing indices"),
        ([cut(A, "mlp", 3, 3)], "native", "each once"),
        ([cut(A, "mlp", 3, 24)], "native", "keeps units 3 to 24: choose from 0 to 23"),
        ([cut(A, "mlp", -1, 3)], "native", "keeps units -1 to 3: choose from 0 to 23"),
        ([cut(A, "heads", 0, 2)], "native", "keeps units 0 to 2: choose from 0 to 1"),
        (
            [Cut(A, "mlp", torch.ones(24, dtype=torch.bool))],
            "native",
            "mask.nonzero()[:, 0]",
        ),
        ([Cut(A, "mlp", torch.ones(2, 2).long())], "native", "mask.nonzero()[:, 0]"),
        ([cut(A, "heads", 0), cut(A, "values", 4)], "native", "keep none of their values"),
    ],
)
def test_impossible_cuts(cuts: list[Cut], format: Any, expected: str) -> None:
    model, adapter = model_of("llama")
    before = state_of(model)
    with pytest.raises(UsageError) as caught:
        shrink(model, adapter, cuts, format=format)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state_of(model) == before


def test_heads_of_opt_have_no_place_in_the_stock_format() -> None:
    model, adapter = model_of("opt")
    cuts = evenly(adapter, model, "heads", 2)
    with pytest.raises(
        UsageError, match="fewer 'heads': choose format 'native', or remove mlp"
    ):
        shrink(model, adapter, cuts)
    shrink(model, adapter, cuts, format="native")
    with pytest.raises(UsageError, match="fewer 'heads'"):  # nor if they left before
        shrink(model, adapter, evenly(adapter, model, "mlp", 7))


def test_numbers_of_heads_that_transformers_refuses() -> None:
    """LLaMA requires a hidden size that is a multiple of the number of heads."""
    model, adapter = model_of("llama", num_key_value_heads=4)
    assert [holds_width(model, adapter, "heads", n) for n in (1, 2, 3, 4)] == [
        *(True, True, False, True)
    ]
    before = state_of(model)
    cuts = evenly(adapter, model, "heads", 3)
    with pytest.raises(UsageError, match="refuses num_attention_heads=3") as caught:
        shrink(model, adapter, cuts)
    assert "keep another number, or choose format 'native'" in str(caught.value)
    assert state_of(model) == before
    mistral, adapter = model_of("mistral", num_key_value_heads=4)
    shrink(mistral, adapter, cuts)
    assert mistral.config.num_attention_heads == 3


def test_widths_without_a_place() -> None:
    model, adapter = model_of("opt")
    assert holds_width(model, adapter, "mlp", 5)
    assert not holds_width(model, adapter, "heads", 2)


@pytest.mark.parametrize(
    ("family", "names", "bias", "expected"),
    [
        ("llama", ["values"], False, "no place for fewer 'values'"),
        ("opt", ["mlp", "heads"], False, "no place for fewer 'heads'"),
        ("mistral", ["mlp"], True, "no place for a bias of mlp.down_proj"),
        ("llama", ["mlp", "heads"], True, None),
        ("opt", ["mlp"], True, None),
        ("mamba", ["inner"], True, None),
    ],
)
def test_formats_are_checked_before_a_run(
    family: str, names: list[str], bias: bool, expected: str | None
) -> None:
    model, adapter = model_of(family)
    check_format(model, adapter, names, "native", bias=bias)
    if expected is None:
        check_format(model, adapter, names, "stock", bias=bias)
    else:
        with pytest.raises(UsageError, match=expected):
            check_format(model, adapter, names, "stock", bias=bias)


def test_parameters_that_are_used_twice() -> None:
    model, adapter = model_of("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(
        UnsupportedModelError, match=r"1\.mlp\.up_proj\.weight are one tensor"
    ):
        shrink(model, adapter, [cut(A, "mlp", 1)], "native")
    shrink(model, adapter, [cut(A, "heads", 1)], "native")


def test_tied_embeddings_are_no_obstacle() -> None:
    model, adapter = model_of("llama", tied=True)
    cuts = random_cuts(model, adapter, ["mlp"], uniform=True)
    expected = logits_of(masked(model, adapter, cuts))
    shrink(model, adapter, cuts)
    assert distance(logits_of(model), expected) <= SURGERY
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("model", [tiny_model("mamba2"), mixture_of_experts()])
def test_families_without_channels(model: Any) -> None:
    adapter = get_adapter("mamba2")
    if model.config.model_type != "mamba2":
        adapter = Adapter("Qwen3MoeForCausalLM", "model.layers", (), found=True)
    cuts = [Cut(f"{adapter.blocks}.0", "mlp", torch.tensor([0]))]
    with pytest.raises(UnsupportedModelError, match="families with channels: opt, llama"):
        shrink(model, adapter, cuts, "native")


def test_attributes_that_must_be_told_the_size() -> None:
    model, adapter = model_of("opt")
    del model.model.decoder.layers[1].self_attn.num_heads
    before = state_of(model)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.num_heads"):
        shrink(model, adapter, evenly(adapter, model, "heads", 2), "native")
    assert state_of(model) == before


def test_a_stock_model_is_compared_with_that_of_transformers() -> None:
    """A parameter that the configuration does not explain is found."""
    model, adapter = model_of("llama")
    model.model.layers[2].extra = nn.Parameter(torch.zeros(3))
    cuts = [cut(block, "mlp", 1, 2) for block in ALL_BLOCKS]
    with pytest.raises(UsageError, match=r"layers\.2\.extra would have shape \(3,\), but"):
        shrink(model, adapter, cuts)

"""Parametrizations: what they compute, what they hold, what is left of them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.errors import UsageError
from layerwise.recovery.low_rank import KINDS, LowRank, Masked
from layerwise.recovery.trainable import ParameterSets, Trainable, in_float32, is_norm
from tests.support.models import random_tokens, tiny_model
from tests.support.retraining import pruned_model, values, zeros_kept
from tests.support.tolerances import MERGED

ON_MASKS = [kind for kind in KINDS if kind != "lora"]


def sparse() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(6, 8, generator=generator) > 0.5
    weight = torch.randn(6, 8, generator=generator) * mask
    weight[0, int(mask[0].nonzero()[0])] = 0  # kept, and zero by chance
    return weight, mask


def change(kind: Any, weight: Tensor, mask: Tensor | None) -> LowRank:
    return LowRank(kind, weight, mask, 3, 2.0, torch.Generator().manual_seed(1))


def trained(kind: Any) -> tuple[Tensor, Tensor, LowRank]:
    """A change with random factors, as if it had been trained."""
    weight, mask = sparse()
    found = change(kind, weight, mask)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for factor in (found.left, found.right):
            factor.add_(torch.randn(factor.shape, generator=generator))
    return weight, mask, found


@pytest.mark.parametrize("kind", KINDS)
def test_the_start_is_the_pruned_weight(kind: Any) -> None:
    weight, mask = sparse()
    torch.testing.assert_close(change(kind, weight, mask)(weight), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_formulas(kind: Any) -> None:
    weight, mask, found = trained(kind)
    product = found.left @ found.right
    expected = {
        "lora": weight + 2 * product,
        "lora-prune": weight + 2 * product,
        "scale-lora": weight * product,
        "masklora": weight + 2 * mask * product,
    }[kind]
    torch.testing.assert_close(found(weight), expected)
    merged = expected if kind == "lora" else expected * mask
    if kind == "lora":
        found.mask.fill_(True)
    torch.testing.assert_close(found.merged(weight), merged)


@pytest.mark.parametrize("kind", ON_MASKS)
def test_merging_keeps_zeros_and_no_zero_is_negative(kind: Any) -> None:
    weight, mask, found = trained(kind)
    merged = found.merged(weight)
    assert bool((merged[~mask] == 0).all())
    assert not bool(torch.signbit(merged[~mask]).any())
    assert bool((merged[mask] != 0).any())


@pytest.mark.parametrize("kind", ["scale-lora", "masklora"])
def test_removed_weights_have_no_gradient(kind: Any) -> None:
    """Not of the weight, but of what multiplies the removed places of the product."""
    weight, mask, found = trained(kind)
    found(weight)[~mask].sum().backward()
    assert float(found.left.grad.abs().max()) == 0  # type: ignore[union-attr]


def test_masklora_moves_a_kept_weight_that_is_zero() -> None:
    weight, mask, found = trained("masklora")
    place = (mask & (weight == 0)).nonzero()[0].tolist()
    assert float(found.merged(weight)[place[0], place[1]].detach()) != 0


def test_masked_holds_zeros() -> None:
    weight, mask = sparse()
    other = weight + 1
    assert torch.equal(Masked(mask)(other), other * mask)
    assert torch.equal(Masked(mask).merged(other), other * mask)


@pytest.mark.parametrize("sets", ["biases", "norms", "biases+norms", *ON_MASKS, "full"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "mamba"])
def test_merged_model_computes_what_the_trained_one_did(family: str, sets: str) -> None:
    """Also with weights that are stored as (in, out) or used without their layer."""
    model, masks = pruned_model(family)
    trainable = Trainable(model, ParameterSets(tuple(sets.split("+")), 2), masks)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trainable.parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1)
        before = model(input_ids=random_tokens(2, 10)).logits
        start = values(tiny_model(family)).keys()
        changed = trainable.merge()
        after = model(input_ids=random_tokens(2, 10)).logits
    assert values(model).keys() == start
    assert set(changed) <= start
    assert zeros_kept(model, masks)
    if sets != "lora-prune":  # there the removed places were used in training
        largest = float(before.abs().max())
        assert float((after - before).abs().max()) <= MERGED * largest
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("sets", ["norms", "head", "masklora", "full"])
@pytest.mark.parametrize("tied", [False, True])
def test_release_leaves_no_trace(sets: str, tied: bool) -> None:
    model, masks = pruned_model("llama", tied=tied)
    kinds = [type(module) for module in model.modules()]
    before = values(model)
    trainable = Trainable(model, ParameterSets((sets,), 2), masks)
    with torch.no_grad():
        for parameter in trainable.parameters:
            parameter.add_(1.0)
    trainable.set_values()
    trainable.release()
    after = values(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [type(module) for module in model.modules()] == kinds
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_head_changes_the_embedding_that_it_is_tied_to(tied: bool) -> None:
    model, masks = pruned_model("llama", tied=tied)
    before = model.get_input_embeddings().weight.detach().clone()
    trainable = Trainable(model, ParameterSets(("head",), 2), masks)
    assert trainable.n_parameters == 2 * (16 + 288)
    with torch.no_grad():
        for parameter in trainable.parameters:
            parameter.add_(0.1)
        changed = trainable.merge()
    after = model.get_input_embeddings().weight
    assert torch.equal(before, after) != tied
    assert list(changed) == ["model.embed_tokens.weight" if tied else "lm_head.weight"]


def test_full_trains_everything_and_norms_norms() -> None:
    model, masks = pruned_model("llama")
    total = sum(p.numel() for p in model.parameters())
    both = Trainable(model, ParameterSets(("full", "head"), 2), masks)
    # the head is trained by its change alone
    assert both.n_parameters == total - 288 * 16 + 2 * (288 + 16)
    both.release()
    full = Trainable(model, ParameterSets(("full",)), masks)
    assert full.n_parameters == total
    full.release()
    norms = Trainable(model, ParameterSets(("norms",)), masks)
    assert norms.n_parameters == sum(
        p.numel() for name, p in model.named_parameters() if "norm" in name
    )
    norms.release()
    assert sum(is_norm(module) for module in model.modules()) == 5


def test_impossible_choices() -> None:
    for names in (("norm",), ("norms", "norms"), ("masklora", "full"), ("",)):
        with pytest.raises(UsageError, match="parameters"):
            ParameterSets(names)
    with pytest.raises(UsageError, match="rank must be at least 1"):
        ParameterSets(("masklora",), 0)
    model, masks = pruned_model("llama")
    with pytest.raises(UsageError, match="nothing to train: biases"):
        Trainable(model, ParameterSets(("biases",)), masks)
    assert all(p.requires_grad for p in model.parameters())


def test_half_precision_comes_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3).bfloat16(), nn.BatchNorm1d(3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with in_float32(model):
        assert model[0].weight.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])

"""Perplexity against its definition, written as a slow loop in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from layerwise.errors import DataError, SolveError, UsageError
from layerwise.run.data.perplexity import perplexity

VOCABULARY = 32
LENGTH = 6
LOSS_ROUND_OFF = 1e-6  # losses of a few nats in float32 against float64


def tiny_model(kind: str) -> Any:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 16,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "opt":
            config = OPTConfig(**common, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5)
            model: Any = OPTForCausalLM(config)
        else:
            config = LlamaConfig(**common, intermediate_size=24, num_key_value_heads=2)
            model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)  # predictions that are not flat
    return model.to(torch.float32).eval()


def tokens(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(VOCABULARY, (count,), generator=generator)


def definition(model: Any, token_ids: Tensor, length: int) -> float:
    """Protocol of the papers, one position at a time."""
    means = []
    for start in range(0, len(token_ids) - length + 1, length):
        window = token_ids[start : start + length]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        losses = [
            float(torch.logsumexp(logits[i], 0) - logits[i, window[i + 1]])
            for i in range(length - 1)
        ]
        means.append(sum(losses) / len(losses))
    return math.exp(sum(means) / len(means))


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_definition(kind: str, dtype: torch.dtype) -> None:
    model, token_ids = tiny_model(kind).to(dtype), tokens(5 * LENGTH + 3)
    expected = definition(model, token_ids, LENGTH)
    assert expected > 1.2 * VOCABULARY  # a model that is wrong, not one that is flat
    for batch_size in (1, 2, 5, 8):
        if dtype != torch.float32 and batch_size != 1:
            continue  # in half precision the logits depend on the size of the batch
        value = perplexity(model, token_ids, sequence_length=LENGTH, batch_size=batch_size)
        assert value == pytest.approx(expected, rel=LOSS_ROUND_OFF)


def test_tail_is_dropped_and_windows_are_alone() -> None:
    model, token_ids = tiny_model("llama"), tokens(3 * LENGTH)
    value = perplexity(model, token_ids, sequence_length=LENGTH)
    longer = torch.cat([token_ids, tokens(LENGTH - 1)])
    assert perplexity(model, longer, sequence_length=LENGTH) == value
    windows = [
        perplexity(model, w, sequence_length=LENGTH) for w in torch.split(token_ids, LENGTH)
    ]
    mean = sum(math.log(window) for window in windows) / 3
    assert value == pytest.approx(math.exp(mean), rel=LOSS_ROUND_OFF)


def test_flat_model_is_as_good_as_guessing() -> None:
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    value = perplexity(model, tokens(20), sequence_length=10)
    assert value == pytest.approx(VOCABULARY, rel=LOSS_ROUND_OFF)


def test_modes_and_random_state_are_restored() -> None:
    model, token_ids = tiny_model("opt"), tokens(20)
    expected = perplexity(model, token_ids, sequence_length=LENGTH)
    model.train()
    model.model.decoder.final_layer_norm.eval()  # modes may be mixed; dropout acts
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert perplexity(model, token_ids, sequence_length=LENGTH) == expected
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(SolveError):
        perplexity(model, token_ids, sequence_length=LENGTH)
    assert [module.training for module in model.modules()] == modes


def test_nothing_is_kept_for_gradients_or_cache() -> None:
    model, outputs = tiny_model("llama"), []
    model.register_forward_hook(lambda *arguments: outputs.append(arguments[-1]))
    perplexity(model, tokens(40), sequence_length=LENGTH, batch_size=4)
    assert [len(output.logits) for output in outputs] == [4, 2]
    assert not any(output.logits.requires_grad for output in outputs)
    assert all(output.past_key_values is None for output in outputs)


def test_nan_is_an_error_that_names_the_window() -> None:
    model = tiny_model("llama")
    token_ids = tokens(4 * LENGTH).clamp(max=VOCABULARY - 2)
    with torch.no_grad():
        model.model.embed_tokens.weight[VOCABULARY - 1] = math.nan
    perplexity(model, token_ids, sequence_length=LENGTH)
    token_ids[2 * LENGTH + 1] = VOCABULARY - 1
    for batch_size in (1, 3):
        with pytest.raises(SolveError, match="not finite in window 2"):
            perplexity(model, token_ids, sequence_length=LENGTH, batch_size=batch_size)


def test_overflow_is_infinite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert perplexity(model, tokens(20), sequence_length=LENGTH) == math.inf


@pytest.mark.parametrize(
    ("token_ids", "length", "batch_size", "error", "match"),
    [
        (tokens(5), LENGTH, 8, DataError, "has 5 tokens, one window needs 6"),
        (tokens(40), 1, 8, UsageError, "sequence_length is 1"),
        (tokens(40), LENGTH, 0, UsageError, "batch_size is 0"),
        (tokens(40), 17, 8, UsageError, "the model has 16 positions"),
        (tokens(40)[None], LENGTH, 8, UsageError, "flatten"),
        (tokens(40) + 1, LENGTH, 8, DataError, "token id 32 at position .* of 32"),
        (tokens(40) - 1, LENGTH, 8, DataError, "token id -1 at position"),
    ],
)
def test_impossible_requests(
    token_ids: Tensor, length: int, batch_size: int, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        perplexity(
            tiny_model("opt"), token_ids, sequence_length=length, batch_size=batch_size
        )


def documented(model: Any, token_ids: Tensor, length: int, stride: int) -> float:
    """Sliding windows with labels, as the documentation of transformers defines them."""
    total, count, scored = 0.0, 0, 0
    for begin in range(0, len(token_ids), stride):
        end = min(begin + length, len(token_ids))
        ids = token_ids[begin:end][None]
        labels = ids.clone()
        labels[:, : -(end - scored)] = -100
        if (new := int((labels != -100).sum()) - 1) > 0:
            with torch.no_grad():
                total += float(model(ids, labels=labels).loss) * new
            count, scored = count + new, end
        if end == len(token_ids):
            break
    return math.exp(total / count)


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("stride", [2, 4, LENGTH])
@pytest.mark.parametrize("count", [LENGTH, 4 * LENGTH, 4 * LENGTH + 1, 5 * LENGTH - 1])
def test_sliding_windows_are_those_of_the_documentation(
    kind: str, stride: int, count: int
) -> None:
    model, token_ids = tiny_model(kind), tokens(count)
    expected = documented(model, token_ids, LENGTH, stride)
    value = perplexity(model, token_ids, sequence_length=LENGTH, stride=stride)
    assert value == pytest.approx(expected, rel=LOSS_ROUND_OFF)


def test_more_context_is_another_protocol() -> None:
    model, token_ids = tiny_model("llama"), tokens(5 * LENGTH)
    plain = perplexity(model, token_ids, sequence_length=LENGTH)
    assert perplexity(model, token_ids, sequence_length=LENGTH, stride=3) != plain
    whole = perplexity(model, token_ids, sequence_length=LENGTH, stride=LENGTH)
    assert whole == pytest.approx(plain, rel=LOSS_ROUND_OFF)


@pytest.mark.parametrize("stride", [0, -1, LENGTH + 1])
def test_impossible_strides(stride: int) -> None:
    with pytest.raises(UsageError, match=f"stride is {stride}: choose one from 1 to 6"):
        perplexity(tiny_model("llama"), tokens(40), sequence_length=LENGTH, stride=stride)

"""The passes that a plan counts are those that a run makes."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.adapters import get_adapter
from layerwise.planning.estimate import forward_passes
from layerwise.planning.model_shape import model_shape
from layerwise.planning.shapes import RunShape
from layerwise.run import capacity
from layerwise.run.prune import prune_model
from tests.support.models import blocks_name, random_tokens, tiny_model

LENGTH, SEQUENCES, LAYERS = 12, 8, 3
TOKENS = random_tokens(SEQUENCES, LENGTH)
PROBE = 2  # tokens of the pass that shows what the first block returns


def shapes_of(model: nn.Module) -> Mapping[str, tuple[int, int]]:
    """Shapes (out, in) of the linears in the blocks, by full name."""
    blocks = blocks_name(model)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks)
    }


def planned(family: str, mode: str, store: int, *, attention: bool) -> float:
    """Operations of the forward passes of a plan."""
    model = tiny_model(family, layers=LAYERS).to("meta")
    shapes, adapter = shapes_of(model), get_adapter(family)
    sizes = model_shape(model, adapter, shapes, LENGTH)
    if not attention:
        model.config.num_attention_heads = 0
    run = RunShape(SEQUENCES, LENGTH, mode, base=0, store=store)
    return forward_passes(model, adapter, shapes, sizes, run).flops[torch.float32]


def made(patch: pytest.MonkeyPatch, family: str, mode: Any) -> tuple[float, float]:
    """Operations of linears in the blocks and of attention in a run."""
    model = tiny_model(family, layers=LAYERS)
    shapes = set(shapes_of(model).values())
    linear, attention = nn.Linear.forward, nn.functional.scaled_dot_product_attention
    linears, attentions = [], []

    def count_linear(module: nn.Linear, states: Tensor) -> Tensor:
        if (module.out_features, module.in_features) in shapes:  # the head has another
            linears.append((states[..., 0].numel(), module.weight.numel()))
        return linear(module, states)

    def count_attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attentions.append((query.shape[0] * query.shape[2], query[0, :, 0].numel()))
        return attention(query, *args, **kwargs)

    with patch.context() as inner:
        inner.setattr(nn.Linear, "forward", count_linear)
        inner.setattr(nn.functional, "scaled_dot_product_attention", count_attention)
        prune_model(
            model,
            "magnitude",
            sparsity=0.5,
            calibration=TOKENS,
            n_sequences=SEQUENCES,
            sequence_length=LENGTH,
            error_correction=mode,
        )
    return (
        sum(2.0 * tokens * size for tokens, size in linears if tokens != PROBE),
        sum(2.0 * LENGTH * tokens * size for tokens, size in attentions if tokens != PROBE),
    )


@pytest.mark.parametrize("store", [0, capacity.STORE])
@pytest.mark.parametrize("mode", ["none", "sequential", "block", "full"])
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_counted_passes_are_those_of_a_run(
    monkeypatch: pytest.MonkeyPatch, family: str, mode: str, store: int
) -> None:
    monkeypatch.setattr(capacity, "STORE", store)
    linears, attention = made(monkeypatch, family, mode)
    assert planned(family, mode, store, attention=False) == linears
    whole = planned(family, mode, store, attention=True)
    if mode == "full" or (mode == "block" and not store):
        assert whole > linears + attention  # counted in passes that end in front of it, too
    else:
        assert whole == linears + attention

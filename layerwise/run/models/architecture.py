"""The adapter of a model: declared for its family, or found by running the model.

An adapter that was found is proven before it is used: on a few tokens, the blocks must give
the same outputs one by one, as a run calls them, and inside the model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters import ADAPTERS, Adapter, get_adapter
from layerwise.adapters.auto import discover
from layerwise.errors import UnsupportedModelError
from layerwise.run.activations.streams import capture, evaluation_mode
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.accounts import account_of, listed

PROBE = (2, 8)  # sequences, tokens of each
STEP = 7919  # a prime, so that the tokens differ
ROUNDINGS = 4  # tolerance in roundings: kernels may add in another order each time


def adapter_of(model: Any) -> Adapter:
    """Adapter declared for the family of a model, or one that is found and proven.

    Raises
    ------
    UnsupportedModelError
        If the model has no declared adapter and none can be found.
    """
    if is_declared(model):
        return get_adapter(model_type_of(model))
    if not hasattr(model, "get_input_embeddings"):
        message = (
            f"a {type(model).__name__} is not a language model of transformers; give one "
            f"of {', '.join(ADAPTERS)}, or any decoder that runs on token ids"
        )
        raise UnsupportedModelError(message)
    # of a streamed model, blocks are not there until they run
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(PROBE[0] * PROBE[1], device=device) * STEP
    tokens = ids.reshape(PROBE) % embedding_rows(model)
    with evaluation_mode(model):
        adapter = discover(model, tokens)
        check_replay(model, adapter.blocks_of(model), tokens)
    return adapter


def is_declared(model: Any) -> bool:
    """Whether an adapter is declared for the family of a model."""
    return model_type_of(model) in ADAPTERS


def model_type_of(model: Any) -> str:
    """Family of a model as named in its configuration; empty if it has none."""
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def as_stored(adapter: Adapter, model: nn.Module, checkpoint: Checkpoint) -> Adapter:
    """Adapter that serves no weight that transformers computes from other stored tensors.

    Such a weight has no stored tensor that its pruned values could replace.
    """
    converted = account_of(model, checkpoint).converted
    if not converted:
        return adapter
    by_block = {block: adapter.stages_of(block) for block in adapter.blocks_of(model)}
    unserved: dict[str, str] = {}
    for block, stages in by_block.items():
        lost = {
            name: converted[f"{block}.{name}.weight"]
            for stage in stages
            for name in stage.linears
            if f"{block}.{name}.weight" in converted
        }
        unserved |= {
            f"{block}.{name}": f"transformers converts it from {listed(stored)}"
            for name, stored in lost.items()
        }
        kept = [stage.only(set(stage.linears) - lost.keys()) for stage in stages]
        by_block[block] = tuple(stage for stage in kept if stage.linears)
    return replace(adapter, by_block=by_block, unserved={**adapter.unserved, **unserved})


@torch.no_grad()
def check_replay(model: nn.Module, blocks: Mapping[str, nn.Module], tokens: Tensor) -> None:
    """Refuse a model whose blocks give other outputs one by one than inside the model.

    Parameters
    ----------
    model
        A decoder in evaluation mode.
    blocks
        Its decoder blocks by name, in order.
    tokens
        Token ids, shape (sequences, length).

    Raises
    ------
    UnsupportedModelError
        If a block depends on more than its hidden states and fixed arguments, or the
        model changes the hidden states between two blocks.
    """
    expected = _outputs(model, blocks, tokens)
    try:
        stream = capture(model, list(blocks.values()), [tokens])
        states = stream.hidden[0]
        outputs = []
        for block, calls in zip(blocks.values(), stream.calls, strict=True):
            states = calls[0].run(block, states, states.device)
            outputs.append(states)
    except Exception as error:
        raise not_one_by_one(model, error) from error
    for name, one, other in zip(blocks, expected, outputs, strict=True):
        slack = ROUNDINGS * torch.finfo(one.dtype).eps * float(one.float().norm())
        if not float((one.float() - other.float()).norm()) <= slack:
            message = (
                f"{name} gives another output when it is run on its own: it depends on "
                f"more than its input, or the model changes the hidden states between two "
                f"blocks; write an adapter for this model"
            )
            raise UnsupportedModelError(message)


def not_one_by_one(model: nn.Module, error: Exception) -> UnsupportedModelError:
    """Error for a model whose blocks fail when they are run one by one."""
    reason = " ".join(str(error).split())
    message = (
        f"the blocks of this {type(model).__name__} cannot be run one by one "
        f"({type(error).__name__}: {reason}); write an adapter for this model"
    )
    return UnsupportedModelError(message)


def _outputs(
    model: nn.Module, blocks: Mapping[str, nn.Module], tokens: Tensor
) -> list[Tensor]:
    """Output of every block inside the model."""
    seen: list[Tensor] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple | list) else output)

    handles = [block.register_forward_hook(note) for block in blocks.values()]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def embedding_rows(model: Any) -> int:
    """Number of token ids of the model."""
    return int(model.get_input_embeddings().num_embeddings)

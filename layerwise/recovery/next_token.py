"""Retraining of the whole model on its next-token loss.

The model is in float32 while it trains, four bytes per parameter. Only trained parameters
have gradients and optimizer state. Checkpointing keeps the activations of one block at a
time, and computes each block twice.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerwise.recovery.records import UnitRecord
from layerwise.recovery.trainable import ParameterSets, Trainable, in_float32
from layerwise.recovery.training import OnStep, State, Training, split, train
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.data.perplexity import mean_loss


def retrain_tokens(
    model: Any,
    sets: ParameterSets,
    masks: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    training: Training,
    *,
    blocks: Sequence[nn.Module] = (),
    state: State | None = None,
    save: Callable[[State], None] = lambda state: None,
    on_step: OnStep = lambda rate, step, loss: None,
) -> tuple[dict[str, Tensor], UnitRecord]:
    """Train a causal language model in place on its mean next-token loss.

    Parameters
    ----------
    model, sets, masks
        The pruned model on its device, the sets to train, and masks by parameter name.
    batches
        Token ids, each (sequences, length); the last ones are held out.
    training
        Steps, learning rates, optimizer.
    blocks
        Decoder blocks whose activations are computed again in the backward pass.
    state, save
        State of an interrupted training, and the function that saves one.
    on_step
        Called after every step.

    Returns
    -------
    tuple
        New values by parameter name, in the types of the model, and the record.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    learn, held_out = split(len(batches))
    held_out_tokens = torch.cat([batches[index] for index in held_out])
    length = held_out_tokens.shape[1]

    def loss_of(index: int) -> Tensor:
        ids = batches[index].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def held_out_loss() -> float:
        return mean_loss(model, held_out_tokens.flatten(), sequence_length=length)

    with evaluation_mode(model), in_float32(model):
        trainable = Trainable(model, sets, masks, seed=training.seed)
        try:
            before = held_out_loss()  # a resumed training has not restored its values yet
            with _checkpointed(blocks):
                final = train(
                    trainable,
                    loss_of,
                    held_out_loss,
                    learn,
                    training,
                    state=state or State(best=before),
                    save=save,
                    on_step=on_step,
                )
        except BaseException:
            trainable.release()
            raise
        trained, names = trainable.n_parameters, []
        if final.best_rate is None:
            trainable.set_values()
            trainable.release()
        else:
            names = list(trainable.merge())
    after = held_out_loss() if names else before
    own = dict(model.named_parameters())
    record = UnitRecord(
        name="",
        trained=trained,
        before=before,
        after=after,
        learning_rate=final.best_rate,
        steps=training.steps,
        losses=tuple(final.losses),
        seconds=time.perf_counter() - start,
    )
    return {name: own[name].detach().cpu() for name in names}, record


@contextmanager
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Drop the activations of blocks, and compute them again in the backward pass."""
    with ExitStack() as stack:
        for block in blocks:
            original = block.forward

            def forward(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                return checkpoint(_original, *args, use_reentrant=False, **kwargs)

            block.forward = forward
            stack.callback(delattr, block, "forward")
        yield

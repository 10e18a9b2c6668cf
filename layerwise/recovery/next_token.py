"""Retraining for the next-token loss, through the whole model.

The model is in float32 while it trains, four bytes per parameter, with gradients and
optimizer state for the trained parameters alone. Checkpointing keeps the activations of one
block at a time and computes each block twice.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerwise.recovery.records import UnitRecord
from layerwise.recovery.trainable import Choice, Trainable, in_float32
from layerwise.recovery.training import OnStep, State, Training, split, train
from layerwise.run.activations.streams import evaluation_mode
from layerwise.run.data.perplexity import mean_loss


def retrain_tokens(
    model: Any,
    choice: Choice,
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
    model, choice, masks
        The pruned model on its device, what is trained, and its masks by parameter name.
    batches
        Token ids, each (sequences, length); the last ones are held out.
    training
        Steps, learning rates, optimizer.
    blocks
        Decoder blocks whose activations are computed again in the backward pass.
    state, save
        Of an interrupted training.
    on_step
        Told about every step.

    Returns
    -------
    tuple
        New values by parameter name, in the types of the model, and the figures.
    """
    start = time.perf_counter()
    device = next(model.parameters()).device
    learn, held_out = split(len(batches))
    judged = torch.cat([batches[index] for index in held_out])
    length = judged.shape[1]

    def loss_of(index: int) -> Tensor:
        ids = batches[index].to(device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def judge() -> float:
        return mean_loss(model, judged.flatten(), sequence_length=length)

    with evaluation_mode(model), in_float32(model):
        trainable = Trainable(model, choice, masks, seed=training.seed)
        try:
            before = judge()  # of the start: a resumed training has not moved yet
            with _computed_twice(blocks):
                found = train(
                    trainable,
                    loss_of,
                    judge,
                    learn,
                    training,
                    state=state or State(best=before),
                    save=save,
                    on_step=on_step,
                )
        except BaseException:
            trainable.release()
            raise
        trained, names = trainable.numbers, []
        if found.best_rate is None:
            trainable.set_values()
            trainable.release()
        else:
            names = list(trainable.merge())
    after = judge() if names else before
    own = dict(model.named_parameters())
    record = UnitRecord(
        name="",
        trained=trained,
        before=before,
        after=after,
        learning_rate=found.best_rate,
        steps=training.steps,
        losses=tuple(found.losses),
        seconds=time.perf_counter() - start,
    )
    return {name: own[name].detach().cpu() for name in names}, record


@contextmanager
def _computed_twice(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks forget their activations until the backward pass."""
    with ExitStack() as stack:
        for block in blocks:
            original = block.forward

            def forward(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
                return checkpoint(_original, *args, use_reentrant=False, **kwargs)

            block.forward = forward
            stack.callback(delattr, block, "forward")
        yield

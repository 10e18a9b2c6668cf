"""Walk from the first block of a model to the last: prune, store, advance.

Every block is pruned in place from the hidden states before it, or restored from the store
of a resumed run. If error correction requires it, there are two streams of hidden states:
one of the dense and one of the pruned model.
"""

from typing import Any

import torch
from torch import Tensor, nn

from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.hidden_store import HiddenStore
from layerwise.run.activations.streams import BATCH, capture
from layerwise.run.models.rewrite import set_bias
from layerwise.run.pipeline.block_checks import stored_block
from layerwise.run.pipeline.blocks import advance, advance_dense
from layerwise.run.pipeline.gradients import gradient_norms
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.removal import BlockStep, Run
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.store import BlockStore
from layerwise.run.pipeline.task import Task
from layerwise.run.steps import status
from layerwise.run.stopwatch import timed


def walk(
    run: Run[Any],
    step: BlockStep,
    store: BlockStore,
    hidden: HiddenStore,
    on_layer: OnLayer,
) -> list[LayerRecord]:
    """Prune block after block, or restore a block from the store.

    Parameters
    ----------
    run
        The model, its calibration data and its task.
    step
        The step that prunes a block.
    store
        Keeps the finished blocks.
    hidden
        Keeps the hidden states between two blocks.
    on_layer
        Called after every matrix.
    """
    task, residency = run.task, run.opened.residency
    blocks = list(run.selection.blocks.values())
    gradients = _gradients(run)
    with timed("capture"), residency.entrance(blocks[0]):
        batches = torch.split(run.own_tokens.tokens, BATCH)
        stream = capture(residency.model, blocks, batches)
    dense = hidden.keep(stream.hidden)
    stream.hidden.clear()
    pruned = dense
    records: list[LayerRecord] = []
    last = _last_with_targets(run)
    for index, (name, block) in enumerate(run.selection.blocks.items()):
        inputs = BlockInputs(
            name,
            block,
            run.selection.stages_of(name),
            stream.calls[index],
            dense,
            pruned,
            gradients.pop(name, {}),
            run.stored_weights,
        )
        done = index >= last  # nothing reads its output
        next_dense, side = dense, None
        status(f"passing the tokens through {name}")
        with residency.block(block, task.device):
            stages = step.stages_of(inputs)
            result = stored_block(store, index, task.adapter, inputs, stages)
            if task.error_correction != "sequential" and not done:
                if result is None and task.staged:
                    side = DenseSide(inputs, stages, task.device)
                next_dense = hidden.keep(advance_dense(task, inputs, side))
            if result is None:
                result = step.prune_block(task, inputs, on_layer, side)
                side = None
                with timed("write"):
                    store.write_block(index, result)
                    store.write_layers([*records, *result.records])
            else:
                _restore(task, block, result, on_layer)
            if not done:
                if task.error_correction == "sequential":
                    pruned = next_dense = hidden.keep(advance(task, inputs, pruned))
                elif task.error_correction == "full":
                    pruned = hidden.keep(advance(task, inputs, pruned))
                else:
                    pruned = next_dense
                dense = next_dense
        records += result.records
    return records


def _last_with_targets(run: Run[Any]) -> int:
    """Index of the last block with something to prune; tokens need not go further."""
    blocks = enumerate(run.selection.blocks)
    return max(index for index, name in blocks if run.selection.stages_of(name))


def _gradients(run: Run[Any]) -> dict[str, dict[str, Tensor]]:
    """Gradient norms of the targets of every block, if the method requires them.

    They belong to the dense model, so a resumed run computes the same norms again.
    """
    task, selection = run.task, run.selection
    if task.gradient is None:
        return {}
    names = {
        block: [name for stage in selection.stages_of(block) for name in stage.linears]
        for block in selection.blocks
    }
    linears = {
        f"{block}.{name}": task.adapter.linear(selection.blocks[block], name)
        for block, targets in names.items()
        for name in targets
    }
    with timed("gradients"):
        norms = gradient_norms(
            run.opened.model, linears, run.own_tokens.tokens, task.gradient
        )
    return {
        block: {name: norms.pop(f"{block}.{name}") for name in targets}
        for block, targets in names.items()
    }


def _restore(task: Task, block: nn.Module, result: PrunedBlock, on_layer: OnLayer) -> None:
    for name, weight in result.weights.items():
        task.adapter.weight(block, name).copy_(weight)
    for name, bias in result.biases.items():
        set_bias(task.adapter.linear(block, name), bias)
    for record in result.records:
        on_layer(record)

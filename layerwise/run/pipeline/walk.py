"""From the first block of a model to the last: prune, store, advance.

Every block is pruned in place from what the blocks before it give, or taken from the
journal of the run that is resumed. Two streams of hidden states run along where error
correction asks for them, that of the dense model and that of the pruned one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.hidden_store import HiddenStore
from layerwise.run.activations.streams import BATCH, capture
from layerwise.run.channels.structure import Structure
from layerwise.run.data.calibration import Calibration
from layerwise.run.models.residency import Residency
from layerwise.run.models.rewrite import set_bias
from layerwise.run.pipeline.blocks import advance, advance_dense
from layerwise.run.pipeline.gradients import gradient_norms, required_gradient
from layerwise.run.pipeline.journal import Journal
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.targets import Choice
from layerwise.run.pipeline.task import Task
from layerwise.run.stopwatch import timed


def walk(
    residency: Residency,
    selection: Choice,
    task: Task,
    tokens: Calibration,
    journal: Journal | None,
    on_layer: OnLayer,
    store: HiddenStore,
) -> list[PrunedBlock]:
    """Prune block after block, or take a block from the journal.

    Parameters
    ----------
    residency
        The model, and where its blocks are.
    selection, task, tokens
        What to prune, how, and the calibration data.
    journal
        Keeps what is done; without one it is returned with its tensors.
    on_layer
        Told about every matrix.
    store
        Where the hidden states between two blocks are kept.
    """
    blocks = list(selection.blocks.values())
    gradients = _gradients(residency.model, selection, task, tokens)
    with timed("capture"), residency.entrance(blocks[0]):
        stream = capture(residency.model, blocks, torch.split(tokens.tokens, BATCH))
    dense = store.keep(stream.hidden)
    stream.hidden.clear()
    pruned = dense
    # channels are cut at the end; everything else is read again from the journal
    in_memory = journal is None or isinstance(task.pattern, Structure)
    done: list[PrunedBlock] = []
    for index, (name, block) in enumerate(selection.blocks.items()):
        inputs = BlockInputs(
            name,
            block,
            selection.stages_of(name),
            stream.calls[index],
            dense,
            pruned,
            gradients.pop(name, {}),
        )
        last = index == len(blocks) - 1  # nothing reads what comes behind it
        next_dense, side = dense, None
        with residency.block(block, task.device):
            result = journal.read_block(index) if journal else None
            if task.error_correction != "sequential" and not last:
                if result is None and task.staged:
                    side = task.dense_side(inputs)
                next_dense = store.keep(advance_dense(task, inputs, side))
            if result is None:
                result = task.prune(inputs, on_layer, side)
                side = None
                if journal is not None:
                    with timed("write"):
                        journal.write_block(index, result)
                        journal.write_layers([*_records(done), *result.records])
            else:
                _restore(task, block, result, on_layer)
            if not last:
                if task.error_correction == "sequential":
                    pruned = next_dense = store.keep(advance(task, inputs, pruned))
                elif task.error_correction == "full":
                    pruned = store.keep(advance(task, inputs, pruned))
                else:
                    pruned = next_dense
                dense = next_dense
        done.append(result if in_memory else result.without_tensors())
    return done


def _gradients(
    model: nn.Module, selection: Choice, task: Task, tokens: Calibration
) -> dict[str, dict[str, Tensor]]:
    """Gradient norms of the targets of every block, where the method asks for them.

    They are those of the dense model, so a resumed run computes the same again.
    """
    statistic = required_gradient(task.solver)
    if statistic is None:
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
        norms = gradient_norms(model, linears, tokens.tokens, statistic)
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


def _records(blocks: Sequence[PrunedBlock]) -> list[LayerRecord]:
    return [record for block in blocks for record in block.records]

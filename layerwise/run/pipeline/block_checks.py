"""Checks of a finished block against the block of the model that it replaces."""

from collections.abc import Iterator, Sequence

from layerwise.adapters import Adapter, Stage
from layerwise.errors import DataError
from layerwise.run.activations.block import BlockInputs
from layerwise.run.pipeline.results import PrunedBlock
from layerwise.run.pipeline.store import BlockStore


def stored_block(
    store: BlockStore,
    index: int,
    adapter: Adapter,
    inputs: BlockInputs,
    stages: Sequence[Stage],
) -> PrunedBlock | None:
    """Return a finished block that fits the model, or None if there is none.

    Parameters
    ----------
    store, index
        Where the block is kept.
    adapter, inputs
        The block of the model.
    stages
        Its linears that are pruned.

    Raises
    ------
    DataError
        The block is damaged, or it has other matrices than the model.
    """
    block = store.read_block(index)
    if block is None:
        return None
    for problem in _misfits(block, adapter, inputs, stages):
        message = (
            f"{store.blocks} has a block {index} that does not fit the model ({problem}): "
            f"start over with --no-resume (resume=False)"
        )
        raise DataError(message)
    return block


def _misfits(
    block: PrunedBlock, adapter: Adapter, inputs: BlockInputs, stages: Sequence[Stage]
) -> Iterator[str]:
    weights = {
        name: adapter.weight(inputs.block, name)
        for stage in stages
        for name in stage.linears
    }
    shapes = {f"{inputs.name}.{name}": tuple(own.shape) for name, own in weights.items()}
    if {record.name: tuple(record.shape) for record in block.records} != shapes:
        yield "its figures are those of other matrices"
    if block.weights.keys() != weights.keys() or block.biases.keys() - weights.keys():
        yield "it has other matrices"
        return
    for name, own in weights.items():
        stored = block.weights[name]
        if (stored.shape, stored.dtype) != (own.shape, own.dtype):
            yield f"{name} is {tuple(stored.shape)} of {stored.dtype}"
        if name in block.biases and block.biases[name].shape != own.shape[:1]:
            yield f"the bias of {name} has shape {tuple(block.biases[name].shape)}"

"""The shapes of a model that a run prunes, as the memory model takes them."""

from collections.abc import Mapping
from typing import Any

from layerwise.adapters import Adapter
from layerwise.run.planning.dry import working_set
from layerwise.run.planning.memory_model import BlockShape, ModelShape, StageShape


def model_shape(
    model: Any, adapter: Adapter, shapes: Mapping[str, tuple[int, int]], length: int
) -> ModelShape:
    """Shapes of a model on the meta device.

    Parameters
    ----------
    model, adapter
        The model and its declaration.
    shapes
        Shape (out, in) of every matrix that is pruned, by full name.
    length
        Tokens of the longest sequence that will be asked for.
    """
    blocks = adapter.blocks_of(model)
    inside = {
        id(parameter) for block in blocks.values() for parameter in block.parameters()
    }
    head, entry = model.get_output_embeddings(), model.get_input_embeddings()
    own_head = set()
    if head is not None and head.weight is not entry.weight:
        own_head = {id(parameter) for parameter in head.parameters()}
    around = {id(p): p.numel() for p in model.parameters() if id(p) not in inside}
    return ModelShape(
        blocks=tuple(
            _block(adapter, name, block, shapes) for name, block in blocks.items()
        ),
        embeddings=sum(size for key, size in around.items() if key not in own_head),
        head=sum(size for key, size in around.items() if key in own_head),
        largest=max(parameter.numel() for parameter in model.parameters()),
        hidden=int(entry.weight.shape[1]),
        itemsize=model.dtype.itemsize,
        working=working_set(model, adapter, length),
    )


def _block(
    adapter: Adapter, name: str, block: Any, shapes: Mapping[str, tuple[int, int]]
) -> BlockShape:
    stages = []
    for stage in adapter.stages_of(name):
        chosen = [shapes[key] for n in stage.linears if (key := f"{name}.{n}") in shapes]
        if chosen:
            stages.append(StageShape(chosen[0][1], tuple(rows for rows, _ in chosen)))
    parameters = sum(parameter.numel() for parameter in block.parameters())
    return BlockShape(parameters, tuple(stages))

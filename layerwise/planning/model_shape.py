"""Shapes of a model that a run prunes, as input of the memory model."""

from collections.abc import Mapping
from typing import Any

from layerwise.adapters import Adapter
from layerwise.planning.dry import working_set
from layerwise.planning.shapes import BlockShape, ModelShape, StageShape
from layerwise.run.activations.pass_through import enclosing_modules


def model_shape(
    model: Any, adapter: Adapter, shapes: Mapping[str, tuple[int, int]], length: int
) -> ModelShape:
    """Shapes of a model on the meta device.

    Parameters
    ----------
    model, adapter
        The model and its declaration.
    shapes
        Shape (out, in) of every pruned matrix, by full name.
    length
        Tokens of the longest sequence.
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
    chosen = [
        stage.only([linear for linear in stage.linears if f"{name}.{linear}" in shapes])
        for stage in adapter.stages_of(name)
    ]
    chosen = [stage for stage in chosen if stage.linears]
    stages = []
    for index, stage in enumerate(chosen):
        matrices = [shapes[f"{name}.{linear}"] for linear in stage.linears]
        rows = tuple(out for out, _ in matrices)
        passes_through = bool(enclosing_modules(chosen, index))
        stages.append(StageShape(matrices[0][1], rows, passes_through))
    parameters = sum(parameter.numel() for parameter in block.parameters())
    return BlockShape(parameters, tuple(stages))

"""The pruned side of a block while its stages are written one after the other.

There is a pass per stage, which stops as soon as the stage has been seen. The output of a
pass-through module, such as attention, is final once its last matrix is written. It is
kept and not computed again (:mod:`layerwise.run.activations.pass_through`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from layerwise.adapters import Stage
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide, inputs_of
from layerwise.run.activations.pass_through import PassThrough
from layerwise.run.activations.streams import replaced_forward


class PrunedSide:
    """A block with the weights written so far, stage by stage.

    Parameters
    ----------
    inputs
        The block and its inputs.
    device
        Where the block is.
    dense
        The dense side of the block; if it keeps inputs, this side keeps final outputs.
        None: every pass starts from the beginning.
    """

    def __init__(
        self, inputs: BlockInputs, device: torch.device, dense: DenseSide | None = None
    ) -> None:
        self._inputs, self._device, self._dense = inputs, device, dense
        self._kept: dict[str, list[Tensor]] = {}  # inputs of linears of such modules
        self._settled: dict[PassThrough, Sequence[Tensor]] = {}

    def inputs_of(self, stage: Stage) -> Iterator[Tensor]:
        """Inputs of a stage, batch by batch; kept if a pass-through module has it."""
        inputs, block = self._inputs, self._inputs.block
        kept: list[Tensor] | None = None
        if self._dense is not None and stage.linears[0] in self._dense.pass_through:
            kept = self._kept[stage.linears[0]] = []
        with ExitStack() as stack:
            for passing, outputs in self._settled.items():
                module = block.get_submodule(passing.module)
                stack.enter_context(replaced_forward(module, _replay(passing, outputs)))
            for batch in inputs_of(self._device, inputs, block, stage, inputs.pruned):
                if kept is not None:
                    kept.append(batch.clone())
                yield batch

    @torch.no_grad()
    def settle(self, stage: Stage) -> None:
        """Compute the final output of the module around a stage that has been written."""
        name = stage.linears[0]
        if self._dense is None or (kept := self._kept.pop(name, None)) is None:
            return
        linear = self._inputs.block.get_submodule(name)
        for index, batch in enumerate(kept):
            kept[index] = linear(batch)
        self._settled[self._dense.pass_through[name]] = kept


def _replay(passing: PassThrough, outputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Forward of a module that returns known outputs, batch by batch."""
    batches = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return passing.output(next(batches).clone())  # the block may overwrite it

    return forward

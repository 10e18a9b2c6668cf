"""The pruned half of a block while its stages are written one after the other.

A pass for each stage stops where the stage is seen. What the weights written so far have
settled for good, such as attention once its output matrix is written, is kept and not
computed again (:mod:`layerwise.run.activations.endings`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from layerwise.adapters import Stage
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide, inputs_of
from layerwise.run.activations.endings import Ending
from layerwise.run.activations.streams import replaced_forward


class PrunedSide:
    """A block as it is, stage by stage.

    Parameters
    ----------
    inputs
        The block and what goes into it.
    device
        Where the block is.
    dense
        The same block before; where it keeps inputs, this side keeps what is settled.
        None: every pass is made from the beginning.
    """

    def __init__(
        self, inputs: BlockInputs, device: torch.device, dense: DenseSide | None = None
    ) -> None:
        self._inputs, self._device, self._dense = inputs, device, dense
        self._kept: dict[str, list[Tensor]] = {}  # inputs of a linear that ends a module
        self._settled: dict[Ending, Sequence[Tensor]] = {}

    def inputs_of(self, stage: Stage) -> Iterator[Tensor]:
        """Inputs of a stage, batch by batch; kept where the stage ends a module."""
        inputs, block = self._inputs, self._inputs.block
        kept: list[Tensor] | None = None
        if self._dense is not None and stage.linears[0] in self._dense.endings:
            kept = self._kept[stage.linears[0]] = []
        with ExitStack() as stack:
            for ending, outputs in self._settled.items():
                module = block.get_submodule(ending.module)
                stack.enter_context(replaced_forward(module, _replay(ending, outputs)))
            for batch in inputs_of(self._device, inputs, block, stage, inputs.pruned):
                if kept is not None:
                    kept.append(batch.clone())
                yield batch

    @torch.no_grad()
    def settle(self, stage: Stage) -> None:
        """Compute what a stage that has been written settles."""
        name = stage.linears[0]
        if self._dense is None or (kept := self._kept.pop(name, None)) is None:
            return
        linear = self._inputs.block.get_submodule(name)
        for index, batch in enumerate(kept):
            kept[index] = linear(batch)
        self._settled[self._dense.endings[name]] = kept


def _replay(ending: Ending, outputs: Sequence[Tensor]) -> Callable[..., Any]:
    """Forward of a module that gives what is known, batch by batch."""
    batches = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return ending.output(next(batches).clone())  # the block may go on in place

    return forward

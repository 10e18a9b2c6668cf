"""The dense half of a block that is pruned stage by stage: what its linears read.

Every stage needs the inputs that the dense block gives it. If those of all stages fit into
`STORE` bytes they come from one pass; else a pass per stage, each stopped where the stage
has been seen, needs no memory.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from layerwise.adapters import Stage
from layerwise.run.streams import Tap, visit_inputs

if TYPE_CHECKING:
    from layerwise.run.pipeline import BlockInputs, Task

STORE = 1 << 30


class DenseSide:
    """A block as it was before anything in it was written.

    Parameters
    ----------
    task, inputs
        The block is copied.
    stages
        Those whose inputs will be asked for.
    """

    def __init__(
        self, task: "Task", inputs: "BlockInputs", stages: Sequence[Stage]
    ) -> None:
        self._task, self._inputs, self._stages = task, inputs, stages
        self._block: nn.Module | None = copy.deepcopy(inputs.block)
        self._stored: dict[str, list[Tensor]] = {}
        tokens = sum(states[..., 0].numel() for states in inputs.dense)
        widths = [task.adapter.weight(inputs.block, s.linears[0]).shape[1] for s in stages]
        size = max((states.element_size() for states in inputs.dense), default=1)
        self._fits = len(stages) > 1 and tokens * sum(widths) * size <= STORE

    def inputs_of(self, stage: Stage) -> Iterable[Tensor]:
        """Inputs of a stage, batch by batch."""
        name = stage.linears[0]
        if self._fits and self._block is not None:
            self._store()
        if self._fits:
            return self._stored[name]
        inputs = self._inputs
        assert self._block is not None
        return inputs_of(self._task.device, inputs, self._block, stage, inputs.dense)

    def forget(self, stage: Stage) -> None:
        """Free the inputs of a stage that will not be asked for again."""
        self._stored.pop(stage.linears[0], None)

    def _store(self) -> None:
        assert self._block is not None
        self._stored = {stage.linears[0]: [] for stage in self._stages}
        taps = [Tap(stage, self._keep(stage.linears[0])) for stage in self._stages]
        inputs, device = self._inputs, self._task.device
        for _ in visit_inputs(
            self._block, taps, inputs.calls, inputs.dense, device, inputs.name, stop=True
        ):
            pass
        self._block = None  # everything was seen

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        def visit(batch: Tensor) -> None:
            self._stored[name].append(batch.clone())  # the block may go on in place

        return visit


def inputs_of(
    device: torch.device,
    inputs: "BlockInputs",
    block: nn.Module,
    stage: Stage,
    hidden: Sequence[Tensor],
) -> Iterator[Tensor]:
    """Inputs of one stage of a block, batch by batch, from a pass of their own."""
    seen: list[Tensor] = []
    taps = [Tap(stage, seen.append)]
    for _ in visit_inputs(
        block, taps, inputs.calls, hidden, device, inputs.name, stop=True
    ):
        yield seen.pop()

"""The dense side of a block that is pruned stage by stage: the inputs of its linears.

A side of a block is the block in one of the two streams: dense, before any of its weights
was written, or pruned, as written so far.

Every stage needs its inputs in the dense block. If there is `room` for the inputs of all
stages, one pass gives them together with the output of the block. Otherwise there is a pass
per stage, which stops as soon as the stage has been seen and stores nothing.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from layerwise.adapters import Stage
from layerwise.adapters.linear import matrix
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.pass_through import PassThrough, PassThroughFinder
from layerwise.run.activations.streams import Tap, block_outputs, visit_inputs
from layerwise.run.capacity import room


def fits(widths: Sequence[int], tokens: int, itemsize: int, available: int) -> bool:
    """Whether one pass over a block keeps the inputs of all its stages.

    Parameters
    ----------
    widths
        Input channels of every stage; for a single stage there is nothing to save.
    tokens
        Number of calibration tokens.
    itemsize
        Bytes of an activation.
    available
        Bytes that the inputs may take, see :func:`layerwise.run.capacity.room`.
    """
    return len(widths) > 1 and tokens * sum(widths) * itemsize <= available


class DenseSide:
    """A block as it was before any of its weights was written.

    The inputs of the first stage must be read before the first weight is written.

    Parameters
    ----------
    inputs
        The block, which is copied if a pass per stage is needed.
    stages
        The stages whose inputs will be read.
    device
        Where the block is.
    """

    def __init__(
        self, inputs: BlockInputs, stages: Sequence[Stage], device: torch.device
    ) -> None:
        self._inputs, self._stages, self._device = inputs, stages, device
        self._stored: dict[str, list[Tensor]] = {}
        self._seen = False  # whether the one pass is done
        self._finder = PassThroughFinder(inputs.block, stages)
        tokens = sum(states[..., 0].numel() for states in inputs.dense)
        first = [inputs.block.get_submodule(stage.linears[0]) for stage in stages]
        widths = [matrix(linear).shape[1] for linear in first]
        size = max((states.element_size() for states in inputs.dense), default=1)
        self.fits = fits(widths, tokens, size, room(device))
        again = bool(stages) and not self.fits
        self._copy: nn.Module | None = copy.deepcopy(inputs.block) if again else None

    def advance(self) -> Iterator[Tensor]:
        """Output of the block, batch by batch; inputs are kept on the way."""
        inputs = self._inputs
        if not self.fits:
            yield from block_outputs(inputs.block, inputs.calls, inputs.dense, self._device)
            return
        for states in self._pass(stop=False):
            assert states is not None
            yield states

    def inputs_of(self, stage: Stage) -> Iterable[Tensor]:
        """Inputs of a stage, batch by batch."""
        if not self.fits:
            assert self._copy is not None
            inputs = self._inputs
            return inputs_of(self._device, inputs, self._copy, stage, inputs.dense)
        if not self._seen:
            for _ in self._pass(stop=True):
                pass
        return self._stored[stage.linears[0]]

    def forget(self, stage: Stage) -> None:
        """Free the inputs of a stage that will not be read again."""
        self._stored.pop(stage.linears[0], None)

    @property
    def pass_through(self) -> Mapping[str, PassThrough]:
        """Pass-through modules by the name of their linear, if the one pass is done."""
        return self._finder.modules()

    def _pass(self, *, stop: bool) -> Iterator[Tensor | None]:
        self._stored = {stage.linears[0]: [] for stage in self._stages}
        taps = [Tap(stage, self._keep(stage.linears[0])) for stage in self._stages]
        inputs = self._inputs
        with ExitStack() as stack:
            for handle in self._finder.attach():
                stack.callback(handle.remove)
            yield from visit_inputs(
                inputs.block,
                taps,
                inputs.calls,
                inputs.dense,
                self._device,
                inputs.name,
                stop=stop,
            )
        self._seen = True

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        def visit(batch: Tensor) -> None:
            self._stored[name].append(batch.clone())  # the block may overwrite it

        return visit


def inputs_of(
    device: torch.device,
    inputs: BlockInputs,
    block: nn.Module,
    stage: Stage,
    hidden: Sequence[Tensor],
) -> Iterator[Tensor]:
    """Inputs of one stage of a block, batch by batch, from a separate pass."""
    seen: list[Tensor] = []
    taps = [Tap(stage, seen.append)]
    for _ in visit_inputs(
        block, taps, inputs.calls, hidden, device, inputs.name, stop=True
    ):
        yield seen.pop()

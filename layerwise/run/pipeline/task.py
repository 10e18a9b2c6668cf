"""What to do to every block."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from layerwise.adapters.base import Adapter
from layerwise.lower_bounds import MEMORY_BUDGET
from layerwise.patterns import Pattern
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.channels.structure import Structure
from layerwise.run.data.calibration import Calibration
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.targets import Choice
from layerwise.run.workers.ranks import ALONE, Ranks

ErrorCorrection = Literal["none", "sequential", "block", "full"]


ERROR_CORRECTIONS: tuple[str, ...] = get_args(ErrorCorrection)


@dataclass(frozen=True)
class Task:
    """What to do to every block.

    `certify` asks for the proven gap of every matrix, within `memory_budget` bytes; `ranks`
    share the work.
    """

    adapter: Adapter
    solver: Any
    pattern: Pattern | Structure
    damping: float
    error_correction: ErrorCorrection
    device: torch.device
    certify: bool = False
    memory_budget: int = MEMORY_BUDGET
    ranks: Ranks = ALONE

    @property
    def staged(self) -> bool:
        """Whether a stage sees the effect of the pruned stages before it."""
        return self.error_correction in ("block", "full")

    def prepared(self, model: nn.Module, selection: Choice, tokens: Calibration) -> "Task":
        """The task with all it must know of the whole model before the first block."""
        return self

    def dense_side(self, inputs: BlockInputs) -> DenseSide:
        """The block as it is, for the inputs of the stages that will be pruned."""
        return DenseSide(inputs, inputs.stages, self.device)

    def prune(
        self,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        side: DenseSide | None = None,
    ) -> PrunedBlock:
        """Prune the target linears of a block in place, see :func:`prune_block`."""
        from layerwise.run.pipeline.blocks import prune_block

        return prune_block(self, inputs, on_layer, side)

"""Result of a pruned block."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from layerwise.run.pipeline.records import LayerRecord

OnLayer = Callable[[LayerRecord], None]  # called after every matrix


@dataclass
class PrunedBlock:
    """Result of one block: stored weights, masks and figures, by linear.

    `biases` holds the biases that a method changed or added.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def without_tensors(self) -> "PrunedBlock":
        """Return the figures only."""
        return PrunedBlock(records=self.records)

"""Result of a pruned block."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from layerwise.run.pipeline.records import LayerRecord

OnLayer = Callable[[LayerRecord], None]  # told about every matrix that is done


@dataclass
class PrunedBlock:
    """Result of one block: stored weights, masks and figures, by linear.

    `biases` holds those that a method changed or added.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)

    def without_tensors(self) -> "PrunedBlock":
        """Its figures alone."""
        return PrunedBlock(records=self.records)

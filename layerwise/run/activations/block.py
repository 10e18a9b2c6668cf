"""A decoder block and its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from layerwise.adapters import Stage
from layerwise.run.activations.streams import Call


@dataclass(frozen=True)
class BlockInputs:
    """A block, its name, and its inputs."""

    name: str
    block: nn.Module
    stages: tuple[Stage, ...]  # linears to prune, in the order of the data flow
    calls: Sequence[Call]
    dense: Sequence[Tensor]  # hidden states of the dense model, per batch
    pruned: Sequence[Tensor]  # of the pruned model; the same object if there is one stream
    gradients: Mapping[str, Tensor] = field(default_factory=dict)  # norms, by linear

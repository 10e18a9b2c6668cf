"""A decoder block and its inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from layerwise.adapters import Adapter, Stage
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
    # weights whose type in the files is another, by full name
    stored: Mapping[str, Tensor] = field(default_factory=dict)

    def weight(self, adapter: Adapter, linear: str) -> Tensor:
        """Dense weight of a linear, (out, in), in the type of its file, to be read only."""
        own = adapter.weight(self.block, linear)
        stored = self.stored.get(f"{self.name}.{linear}")
        return own if stored is None else stored.to(own.device)

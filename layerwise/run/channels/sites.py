"""Sites at which channels can be removed: one coupling in one block."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from layerwise.adapters import Adapter, Channels, Coupling


@dataclass(frozen=True)
class Site:
    """One coupling in one block.

    Parameters
    ----------
    block
        Full name of the block.
    coupling, channels
        The declaration, and its channels in this block.
    allowed
        Numbers of units that the format can represent; None: any.
    """

    block: str
    coupling: Coupling
    channels: Channels
    allowed: frozenset[int] | None = None

    @property
    def name(self) -> str:
        """Full name, such as ``model.layers.0.mlp``."""
        return f"{self.block}.{self.coupling.name}"

    @property
    def main(self) -> str:
        """Linear on which channels are chosen, by its name relative to the block."""
        return self.coupling.consumers[-1]

    @property
    def heads(self) -> int:
        """Number of heads that must keep equally many units; 1 if units are independent."""
        balance = self.channels.balance
        return 1 if balance is None else int(balance.max()) + 1

    @property
    def rounds(self) -> int:
        """Number of units per head, and so of rounds in which every head loses one."""
        return self.channels.units // self.heads


def sites_of(
    adapter: Adapter, blocks: Mapping[str, nn.Module], names: tuple[str, ...]
) -> dict[str, tuple[Site, ...]]:
    """Couplings of the given names in every block, in the order of the data flow."""
    order = [name for stage in adapter.stages for name in stage.linears]
    chosen = [coupling for coupling in adapter.couplings if coupling.name in names]
    chosen.sort(key=lambda coupling: order.index(coupling.consumers[-1]))
    return {
        name: tuple(Site(name, c, c.resolve(block, name)) for c in chosen)
        for name, block in blocks.items()
    }

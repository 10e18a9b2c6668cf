"""Where channels can be removed: one coupling in one block."""

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
        The declaration, and what it is in this block.
    allowed
        Numbers of units that the format has a place for; None: any.
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
        """Linear on which channels are chosen, relative to the block."""
        return self.coupling.consumers[-1]

    @property
    def heads(self) -> int:
        """Heads that must keep equally many units; 1 where units are free."""
        balance = self.channels.balance
        return 1 if balance is None else int(balance.max()) + 1

    @property
    def rounds(self) -> int:
        """Units of every head: how often all heads can lose one."""
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

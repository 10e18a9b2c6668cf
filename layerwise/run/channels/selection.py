"""Selection of the channels that take part in a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from layerwise.adapters import ADAPTERS, get_adapter
from layerwise.adapters.base import Adapter, Stage
from layerwise.errors import UnsupportedModelError, UsageError
from layerwise.run.channels.restoration import stages_at
from layerwise.run.channels.sites import Site, sites_of
from layerwise.run.channels.structure import COUPLINGS, Structure
from layerwise.run.channels.widths import COARSE
from layerwise.run.models.rewrite import parameters_of
from layerwise.run.models.stock import holds_width
from layerwise.run.pipeline.targets import refuse_shared, select


class ChannelSelection:
    """Channels of the blocks that take part, checked against the format."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        targets: Sequence[str],
        ignore: Sequence[str],
        structure: Structure,
    ) -> None:
        self.targets, self.ignore, self.structure = targets, ignore, structure
        self.blocks: Mapping[str, nn.Module] = adapter.blocks_of(model)
        sites = sites_of(adapter, self.blocks, coupling_names(adapter, structure))
        if structure.format == "stock":
            sites = {block: _in_stock(model, adapter, s) for block, s in sites.items()}
        candidates = {
            f"{block}.{name}": adapter.linear(self.blocks[block], name)
            for block, inside in sites.items()
            for site in inside
            for name in site.coupling.consumers
        }
        chosen = select(dict(model.named_modules()), candidates, targets, ignore)
        refuse_shared(model, chosen)
        self.sites = {
            block: tuple(
                site
                for site in inside
                if all(f"{block}.{name}" in chosen for name in site.coupling.consumers)
            )
            for block, inside in sites.items()
        }
        self.names = [
            f"{block}.{name}"
            for block, inside in self.sites.items()
            for site in inside
            for name in site.coupling.consumers
        ]
        self.total = parameters_of(self.blocks)
        if not self.names:
            message = (
                f"ignore={list(ignore)} excludes a consumer of every coupling, so channels "
                f"cannot be removed: ignore fewer"
            )
            raise UsageError(message)

    @property
    def all_sites(self) -> list[Site]:
        """All sites in the order of the model."""
        return [site for inside in self.sites.values() for site in inside]

    def stages_of(self, block: str) -> tuple[Stage, ...]:
        """Consumers of channels, each a stage of its own."""
        return stages_at(self.sites.get(block, ()))


def _in_stock(model: Any, adapter: Adapter, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Add to the sites the numbers of heads that a stock configuration accepts."""

    def allowed(site: Site) -> frozenset[int]:
        counts = range(1, site.channels.units + 1)
        name = site.coupling.name
        return frozenset(n for n in counts if holds_width(model, adapter, name, n))

    return tuple(
        replace(site, allowed=allowed(site)) if site.coupling.name == COARSE else site
        for site in sites
    )


def coupling_names(adapter: Adapter, structure: Structure) -> tuple[str, ...]:
    """Couplings of a structure that the architecture has and the format can shrink.

    Raises
    ------
    UnsupportedModelError
        If no channels are declared for this architecture.
    UsageError
        If the format can shrink none of them.
    """
    if not adapter.couplings:
        families = ", ".join(name for name in ADAPTERS if get_adapter(name).couplings)
        message = (
            f"no channels are declared for {adapter.name}, so it cannot become smaller: "
            f"choose a model of {families}"
        )
        raise UnsupportedModelError(message)
    known = [c for c in adapter.couplings if c.name in COUPLINGS[structure.kind]]
    names = [c.name for c in known if structure.format != "stock" or c.stock]
    if not names:
        message = (
            f"the stock format of {adapter.name} has no place for fewer "
            f"{', '.join(c.name for c in known)}: choose format native"
        )
        raise UsageError(message)
    return tuple(names)

"""A structured run: which channels of a model take part, how many stay, and the cuts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.adapters import ADAPTERS, Adapter, Stage
from layerwise.errors import InvalidProblemError, UnsupportedModelError, UsageError
from layerwise.run.channels.allocate import Allocation
from layerwise.run.channels.restoration import ChannelTask, Site, sites_of
from layerwise.run.channels.structure import COUPLINGS, Structure, removes_columns
from layerwise.run.channels.survey import survey
from layerwise.run.channels.widths import (
    COARSE,
    COMPAT_RULE,
    check_reachable,
    choose_widths,
    rule_of,
)
from layerwise.run.data.calibration import Calibration
from layerwise.run.models.padding import pad_to_widest
from layerwise.run.models.rewrite import parameters_of
from layerwise.run.models.stock import check_format, holds_bias, holds_width
from layerwise.run.models.surgery import Cut, shrink
from layerwise.run.pipeline.results import PrunedBlock
from layerwise.run.pipeline.targets import refuse_shared, select
from layerwise.run.pipeline.task import Task
from layerwise.run.stopwatch import timed
from layerwise.solve import solver_name
from layerwise.solvers.columns import ColumnPruning

SURVEYED = ("optimal", "al-mm", "al-am", COMPAT_RULE)  # look at every layer first


class ChannelSelection:
    """Which channels of which blocks take part, checked against the format."""

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
                f"ignore={list(ignore)} leaves no channels that could leave as a whole"
            )
            raise UsageError(message)

    @property
    def transposed(self) -> set[str]:
        """No linear with channels stores its weight as (in, out)."""
        return set()

    def stages_of(self, block: str) -> tuple[Stage, ...]:
        """Consumers of channels, each a stage of its own."""
        return tuple(
            Stage((name,))
            for site in self.sites.get(block, ())
            for name in site.coupling.consumers
        )

    def by_parameter(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Matrices of all blocks by weight parameter."""
        return {
            f"{block}.{name}.weight": tensor
            for block, part in zip(self.blocks, parts, strict=True)
            for name, tensor in part.items()
        }

    def cuts(self, parts: Sequence[PrunedBlock]) -> list[Cut]:
        """What leaves for good, from the masks of the main consumers."""
        found = []
        for block, part in zip(self.blocks, parts, strict=True):
            for site in self.sites.get(block, ()):
                if site.main in part.masks:
                    kept = torch.unique(site.channels.groups[part.masks[site.main][0]])
                    found.append(Cut(block, site.coupling.name, kept))
        return found


@dataclass(frozen=True)
class StructuredTask(ChannelTask):
    """A channel task that chooses the widths of all blocks before the first one."""

    total: int = 0  # parameters of all blocks
    allocation: Allocation | None = field(default=None, compare=False)

    def prepared(self, model: Any, selection: Any, tokens: Calibration) -> "StructuredTask":
        """The task with the units that stay at every place, after a survey if need be."""
        if self.keep:
            return self
        structure, method = self.structure, solver_name(self.solver)
        rule, _ = rule_of(structure, method)
        with timed("survey"):
            findings = survey(
                model, self, selection.blocks, tokens, curves=rule == "optimal"
            )
        keep, allocation = choose_widths(
            structure, method, self.places, selection.total, findings
        )
        return replace(self, keep=keep, allocation=allocation)

    @property
    def structure(self) -> Structure:
        """What is asked."""
        assert isinstance(self.pattern, Structure)
        return self.pattern

    @property
    def places(self) -> list[Site]:
        """All sites in the order of the model."""
        return [site for inside in self.sites.values() for site in inside]

    def notes(self) -> list[str]:
        """What the format changes about what was asked, and what the widths should cost."""
        structure, adapter = self.structure, self.adapter
        asked = COUPLINGS[structure.kind]
        taken = coupling_names(adapter, structure)
        notes = [
            f"the stock format of {adapter.name} has no place for fewer {coupling.name}: "
            f"they stay, and {' and '.join(taken)} make up for them"
            for coupling in adapter.couplings
            if coupling.name in asked and coupling.name not in taken
        ]
        if self.allocation is not None:
            percent = self.allocation.price * self.total / 100
            return [
                f"the widths should add {self.allocation.error:.4f} to the mean loss of a "
                f"token, and the next 1 % of the blocks {percent:.4f}"
            ]
        if getattr(self.solver, "restoration", None) == "intercept" and not self.holds_bias:
            notes.append(
                f"the stock format of {adapter.name} has no place for the biases of "
                f"{solver_name(self.solver)}: weights are refitted without"
            )
        return notes


def structured_task(task: Task, model: Any, selection: ChannelSelection) -> StructuredTask:
    """Task of a structured run; what the format cannot hold is refused here.

    Raises
    ------
    UsageError
        If the format has no place for the result.
    InvalidProblemError
        If the method does not handle whole columns.
    """
    solver, structure = task.solver, selection.structure
    if not removes_columns(solver):
        message = (
            f"{solver_name(solver)} does not remove whole columns: choose columns, fasp or "
            f"flap, or a mask method such as wanda"
        )
        raise InvalidProblemError(message)
    rule, _ = rule_of(structure, solver_name(solver))
    if rule in SURVEYED and not isinstance(solver, ColumnPruning):
        message = (
            f"allocation {rule} reads the scores of columns, which {solver_name(solver)} "
            f"does not tell: choose uniform, or a method such as columns, fasp or flap"
        )
        raise UsageError(message)
    mains = {site.main for inside in selection.sites.values() for site in inside}
    with_bias = structure.format == "native" or all(
        holds_bias(model, task.adapter, name) for name in mains
    )
    if getattr(solver, "restoration", None) == "bias" and not with_bias:
        names = coupling_names(task.adapter, structure)
        check_format(model, task.adapter, names, "stock", bias=True)  # says why
    found = StructuredTask(
        **vars(task), sites=selection.sites, holds_bias=with_bias, total=selection.total
    )
    check_reachable(structure, found.places, selection.total)
    if rule in SURVEYED:
        return found
    keep, _ = choose_widths(
        structure, solver_name(solver), found.places, selection.total, {}
    )
    return replace(found, keep=keep)


def _in_stock(model: Any, adapter: Adapter, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """Sites with the numbers of heads that a stock configuration accepts."""

    def allowed(site: Site) -> frozenset[int]:
        counts = range(1, site.channels.units + 1)
        name = site.coupling.name
        return frozenset(n for n in counts if holds_width(model, adapter, name, n))

    return tuple(
        replace(site, allowed=allowed(site)) if site.coupling.name == COARSE else site
        for site in sites
    )


def coupling_names(adapter: Adapter, structure: Structure) -> tuple[str, ...]:
    """Couplings of a structure that an architecture has and the format can drop.

    Raises
    ------
    UnsupportedModelError
        If no channels are declared for this architecture.
    UsageError
        If the format can drop none of them.
    """
    if not adapter.couplings:
        families = ", ".join(ADAPTERS)
        message = (
            f"no channels are declared for {adapter.name}, so it cannot become smaller; "
            f"declared families: {families} (mamba2 without)"
        )
        raise UnsupportedModelError(message)
    known = [c for c in adapter.couplings if c.name in COUPLINGS[structure.kind]]
    found = [c.name for c in known if structure.format != "stock" or c.stock]
    if not found:
        message = (
            f"the stock format of {adapter.name} has no place for fewer "
            f"{', '.join(c.name for c in known)}: choose format native"
        )
        raise UsageError(message)
    return tuple(found)


def make_smaller(
    model: Any, adapter: Adapter, cuts: Sequence[Cut], structure: Structure
) -> None:
    """Cut a model whose removed columns are zero, in the format of the run."""
    native = structure.format != "stock"
    shrink(model, adapter, cuts, format="native" if native else "stock")
    if structure.format == "padded":
        pad_to_widest(model, adapter)

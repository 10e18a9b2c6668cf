"""Removal of channels, which makes the model smaller."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from layerwise.adapters import Adapter, Stage
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.channels.allocate import Allocation
from layerwise.run.channels.findings import Finding
from layerwise.run.channels.restoration import (
    ChannelMethod,
    Restoration,
    collect,
    stages_at,
)
from layerwise.run.channels.selection import ChannelSelection, coupling_names
from layerwise.run.channels.sites import Site
from layerwise.run.channels.structure import (
    COUPLINGS,
    KINDS,
    Structure,
    choose_structure,
    removes_columns,
)
from layerwise.run.channels.survey import survey
from layerwise.run.channels.widths import (
    COMPAT_RULE,
    check_reachable,
    choose_widths,
    default_rule,
    is_forced,
    rule_of,
)
from layerwise.run.models.accounts import remarks
from layerwise.run.models.cuts import Cut
from layerwise.run.models.opening import OpenedModel
from layerwise.run.models.padding import pad_to_widest
from layerwise.run.models.rewrite import parameters_of
from layerwise.run.models.stock import check_format, holds_bias
from layerwise.run.models.stored_types import RunTypes, stored_digests, take_stored_types
from layerwise.run.models.surgery import shrink
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.removal import Amount, Removed, Run, Shrunk
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.store import BlockStore, finished_block
from layerwise.run.pipeline.task import Task
from layerwise.run.stopwatch import timed
from layerwise.solvers.columns import ColumnPruning

SURVEYED = ("optimal", "al-mm", "al-am", COMPAT_RULE)  # rules that need a survey


@dataclass(frozen=True)
class RemoveChannels:
    """Remove whole channels from the blocks, and refit the layers that read them.

    Parameters
    ----------
    method, structure
        Method that chooses and restores, and the requested structure.
    """

    method: Method
    structure: Structure

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the kinds of channels."""
        return KINDS

    @classmethod
    def from_arguments(cls, method: Method, amount: Amount) -> "RemoveChannels | None":
        """Create the removal from the arguments of a run; None if they mean zeros."""
        structure = choose_structure(method.solver, amount)
        if structure is None:
            return None
        for name in amount.given("keep_zeros"):
            message = f"{name} is for zeros, not for smaller models: leave it out"
            raise UsageError(message)
        return cls(method.with_certify(bounded=False), structure)

    @property
    def pattern(self) -> None:
        """No pattern: removed channels do not remain as zeros."""

    @property
    def needs_whole_model(self) -> bool:
        """The model is cut as a whole."""
        return True

    @property
    def refused_by_ranks(self) -> str:
        """Why several ranks cannot share the run."""
        return (
            "channels are chosen and cut for the whole model, which ranks cannot share: "
            "start without torchrun"
        )

    def check_storable(self) -> None:
        """Every smaller model can be written to a folder."""

    def for_model(self, model_type: str, *, ours: bool = False) -> "RemoveChannels":
        """Return it with Wanda as warm start for every family: SparseGPT keeps columns."""
        return replace(self, method=self.method.with_start("wanda"))

    def select(
        self, opened: OpenedModel, targets: Sequence[str], ignore: Sequence[str]
    ) -> ChannelSelection:
        """Select the channels that take part.

        Raises
        ------
        UsageError
            The format cannot represent the result, or the sparsity is too high.
        InvalidProblemError
            The method does not handle whole columns.
        """
        structure, method = self.structure, self.method
        selection = ChannelSelection(
            opened.model, opened.adapter, targets, ignore, structure
        )
        if not removes_columns(method.solver):
            message = (
                f"{method.name} does not remove whole columns: choose columns, fasp or "
                f"flap, or a mask method such as wanda"
            )
            raise InvalidProblemError(message)
        if self._rule in SURVEYED and not isinstance(method.solver, ColumnPruning):
            message = (
                f"allocation {self._rule} reads the scores of columns, which {method.name} "
                f"does not have: choose uniform, or a method such as columns, fasp or flap"
            )
            raise UsageError(message)
        if self._restoration == "bias" and not self._holds_bias(opened, selection):
            names = coupling_names(opened.adapter, structure)
            check_format(opened.model, opened.adapter, names, "stock", bias=True)
        check_reachable(structure, selection.all_sites, selection.total)
        if not self._needs_survey(selection):
            self._widths(selection, {})
        return selection

    def notes(self, run: Run[ChannelSelection]) -> list[str]:
        """Remarks on the differences between the requested structure and the format."""
        structure, adapter = self.structure, run.opened.adapter
        requested = COUPLINGS[structure.kind]
        taken = coupling_names(adapter, structure)
        notes = [
            f"the stock format of {adapter.name} has no place for fewer {coupling.name}: "
            f"they are kept, and {' and '.join(taken)} are pruned more"
            for coupling in adapter.couplings
            if coupling.name in requested and coupling.name not in taken
        ]
        intercept = self._restoration == "intercept"
        if intercept and not self._holds_bias(run.opened, run.selection):
            notes.append(
                f"the stock format of {adapter.name} has no place for the biases of "
                f"{self.method.name}: weights are refitted without biases"
            )
        if (source := run.opened.source) is not None:
            notes += remarks(run.opened.model, source, are_kept=False)
        return notes

    def disk_needed(self, run: Run[ChannelSelection]) -> int:
        """Return 0: unknown before the widths are chosen."""
        return 0

    def prepare(self, run: Run[ChannelSelection]) -> "ChosenChannels":
        """Choose the widths of all blocks, after a survey of the model if needed."""
        selection = run.selection
        holds_bias = self._holds_bias(run.opened, selection)
        method = ChannelMethod(self.method, str(self.structure), holds_bias)
        findings: Mapping[str, Finding] = {}
        before: Mapping[str, str] = {}
        if run.output is not None:
            before = stored_digests(run.opened.source, run.opened.model)
        if self._needs_survey(selection):
            with timed("survey"):
                findings = survey(
                    run, method, selection.sites, curves=self._rule == "optimal"
                )
        keep, allocation = self._widths(selection, findings)
        return ChosenChannels(
            method, self.structure, selection.sites, keep, before, allocation
        )

    def recipe_fields(self) -> dict[str, Any]:
        """Fields of a recipe that describe this removal."""
        structure = self.structure
        return {
            **self.method.recipe_fields(),
            "pattern": structure.kind,
            "sparsity": structure.sparsity,
            "allocation": structure.allocation or default_rule(structure, self.method.name),
            "format": structure.format,
            "multiple": structure.multiple,
        }

    @property
    def _rule(self) -> str:
        return rule_of(self.structure, self.method.name)[0]

    def _needs_survey(self, selection: ChannelSelection) -> bool:
        forced = is_forced(self.structure, selection.all_sites)
        return self._rule in SURVEYED and not (self._rule == "optimal" and forced)

    @property
    def _restoration(self) -> str | None:
        return getattr(self.method.solver, "restoration", None)

    def _widths(
        self, selection: ChannelSelection, findings: Mapping[str, Finding]
    ) -> tuple[dict[str, int], Allocation | None]:
        return choose_widths(
            self.structure, self.method.name, selection.all_sites, selection.total, findings
        )

    def _holds_bias(self, opened: OpenedModel, selection: ChannelSelection) -> bool:
        """Whether the main consumers can get a bias in the format of the run."""
        mains = {site.main for site in selection.all_sites}
        return self.structure.format == "native" or all(
            holds_bias(opened.model, opened.adapter, name) for name in mains
        )


@dataclass(frozen=True)
class ChosenChannels:
    """A removal of channels with the widths of all blocks.

    Parameters
    ----------
    method, structure
        Method that chooses and restores channels, and the requested structure.
    sites
        Couplings by the full name of the block, in the order of the data flow.
    keep
        Number of kept units per head, by the name of the site.
    before
        Hash of every tensor of the dense model; empty if nothing is written.
    allocation
        Result of the optimisation of the widths, or None.
    """

    method: ChannelMethod
    structure: Structure
    sites: Mapping[str, tuple[Site, ...]]
    keep: Mapping[str, int]
    before: Mapping[str, str]
    allocation: Allocation | None

    def findings(self, run: Run[ChannelSelection]) -> list[str]:
        """Predicted loss of the widths."""
        if self.allocation is None:
            return []
        percent = self.allocation.price * run.selection.total / 100
        return [
            f"the widths should add {self.allocation.error:.4f} to the mean loss of a "
            f"token, and the next 1 % of the blocks {percent:.4f}"
        ]

    def stages_of(self, inputs: BlockInputs) -> tuple[Stage, ...]:
        """Consumers of the block that will be restored."""
        return stages_at(self._narrowed(inputs.name))

    def prune_block(
        self,
        task: Task,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        dense: DenseSide | None = None,
    ) -> PrunedBlock:
        """Set the columns of removed channels of a block to zero, in place."""
        if task.staged:
            stages = self.stages_of(inputs)
            dense = dense or DenseSide(inputs, stages, task.device)
            restoration = Restoration(self.method, task, inputs, on_layer, dense=dense)
        else:
            collected = collect(task, inputs, self.sites.get(inputs.name, ()))
            restoration = Restoration(
                self.method, task, inputs, on_layer, collected=collected
            )
        for site in self._narrowed(inputs.name):
            restoration.remove(site, self.keep[site.name])
        return restoration.result

    def finish(self, run: Run[ChannelSelection], store: BlockStore) -> Removed:
        """Cut the model, in place, to the kept channels."""
        masks: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        cuts = []
        for index, block in enumerate(run.selection.blocks):
            done = finished_block(store, index)
            for name, mask in done.masks.items():
                masks[f"{block}.{name}.weight"] = mask
                weights[f"{block}.{name}.weight"] = done.weights[name]
            for site in self.sites.get(block, ()):
                if site.main in done.masks:
                    kept = torch.unique(site.channels.groups[done.masks[site.main][0]])
                    cuts.append(Cut(block, site.coupling.name, kept))
        types: RunTypes | None = None
        if run.output is not None and run.opened.source is not None:
            types = take_stored_types(run.opened.source, run.opened.model, weights)
        make_smaller(run.opened.model, run.opened.adapter, cuts, self.structure)
        allocation = self.allocation
        shrunk = Shrunk(
            cuts,
            self.structure.format,
            self.before,
            run.selection.total,
            parameters_of(run.selection.blocks),
            None if allocation is None else allocation.error,
            None if allocation is None else allocation.price,
            types,
        )
        return Removed(masks, shrunk=shrunk)

    def _narrowed(self, block: str) -> list[Site]:
        """Sites of a block that lose channels."""
        sites = self.sites.get(block, ())
        return [site for site in sites if self.keep[site.name] < site.rounds]


def make_smaller(
    model: Any, adapter: Adapter, cuts: Sequence[Cut], structure: Structure
) -> None:
    """Cut a model whose removed columns are zero, in the format of the run."""
    native = structure.format != "stock"
    shrink(model, adapter, cuts, format="native" if native else "stock")
    if structure.format == "padded":
        pad_to_widest(model, adapter)

"""Zeros in the weights: the removal of single weights, from arguments to results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from layerwise.adapters import Stage
from layerwise.errors import UsageError
from layerwise.moments import Moments
from layerwise.patterns import NM, Columns, FixedMask, Pattern, Unstructured, parse_pattern
from layerwise.problem import LayerProblem
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.activations.pruned_side import PrunedSide
from layerwise.run.models.accounts import remarks
from layerwise.run.models.opening import OpenedModel
from layerwise.run.models.stored_types import weight_bytes
from layerwise.run.pipeline.block_files import MASK, WEIGHT
from layerwise.run.pipeline.blocks import collect_at_once, collect_pair
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.removal import Amount, Removed, Run
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.stages import solve_stages
from layerwise.run.pipeline.store import BlockStore
from layerwise.run.pipeline.targets import Selection, note_on
from layerwise.run.pipeline.task import Task
from layerwise.run.stopwatch import timed
from layerwise.solve import refuse_unless_solvable

ROUNDING = 1e-9  # of a sparsity such as 1 - 2 / 5
KEPT = (
    "every zero that is there already stays zero, and the pattern holds as well; where "
    "there are more zeros than it asks for, all of them stay (or say --no-keep-zeros)"
)
# FISTAPruner starts from SparseGPT on OPT and from Wanda on every LLaMA
PUBLISHED_STARTS = {"opt": "sparsegpt"}


@dataclass(frozen=True)
class ZeroWeights:
    """Set single weights to zero; every matrix keeps its shape.

    Parameters
    ----------
    method
        Method that solves the matrices.
    pattern
        Pattern of the zeros in every matrix.
    keep_zeros
        Whether every zero that a weight has already stays zero; None, which is the same as
        False, until the model is known.
    """

    method: Method
    pattern: Pattern
    keep_zeros: bool | None = None

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return no names: the pattern of zeros has its own syntax."""
        return ()

    @classmethod
    def from_arguments(cls, method: Method, amount: Amount) -> "ZeroWeights":
        """Create the removal from the arguments of a run.

        Raises
        ------
        UsageError, InvalidProblemError
            The arguments contradict each other, or the method does not handle the pattern.
        """
        for name in amount.given("allocation", "format", "multiple"):
            message = (
                f"{name} is for smaller models: give pattern 'columns' or 'heads', or a "
                f"method that removes columns, such as fasp"
            )
            raise UsageError(message)
        pattern = choose_pattern(amount.sparsity, amount.pattern, amount.group)
        bounded = isinstance(pattern, NM | Unstructured | FixedMask)
        refuse_impossible(method, pattern)
        return cls(method.with_certify(bounded=bounded), pattern, amount.keep_zeros)

    @property
    def needs_whole_model(self) -> bool:
        """Whether the blocks cannot be loaded one by one."""
        return self.method.needs_whole_model

    @property
    def refused_by_ranks(self) -> str | None:
        """Why several ranks cannot share the run, or None."""
        if self.method.needs_whole_model:
            return (
                f"{self.method.name} needs gradients of the whole model, which ranks do "
                f"not share: start without torchrun, or choose another method"
            )
        if "fluctuation" in self.method.statistics:
            return (
                f"{self.method.name} needs a statistic that depends on the order of the "
                f"sequences: start without torchrun, or choose another method"
            )
        return None

    def check_storable(self) -> None:
        """Refuse a pattern that no recipe or manifest can name."""
        if not isinstance(self.pattern, NM | Unstructured):
            message = (
                f"the pattern {self.pattern} cannot be written to a folder; prune without "
                f"output_dir and save the model yourself"
            )
            raise UsageError(message)

    def for_model(self, model_type: str, *, ours: bool = False) -> "ZeroWeights":
        """Return the removal with the warm start of a paper for a family of models.

        The zeros of a model that layerwise wrote are kept unless it was said otherwise.
        """
        start = PUBLISHED_STARTS.get(model_type, "wanda")
        if isinstance(self.pattern, Columns):  # SparseGPT prunes no columns
            start = "wanda"
        keep = ours or None if self.keep_zeros is None else self.keep_zeros
        return replace(self, method=self.method.with_start(start), keep_zeros=keep)

    def select(
        self, opened: OpenedModel, targets: Sequence[str], ignore: Sequence[str]
    ) -> Selection:
        """Select the linears to prune; refuse impossible entries and shapes."""
        return Selection(opened.model, opened.adapter, targets, ignore, self.pattern)

    def notes(self, run: Run[Selection]) -> list[str]:
        """Remarks for the log before the run."""
        opened, notes = run.opened, [KEPT] if self.keep_zeros else []
        if opened.adapter.found:
            notes.append(note_on(opened.model, opened.adapter, run.selection))
        if opened.source is not None:
            notes += remarks(opened.model, opened.source)
        return notes

    def disk_needed(self, run: Run[Selection]) -> int:
        """Bytes of the copy of the checkpoint and of the finished blocks."""
        source, model = run.opened.source, run.opened.model
        if source is None:
            return 0
        copy = sum(entry.n_bytes for entry in source.entries().values())
        names = run.selection.names
        pruned = [model.get_parameter(f"{name}.weight") for name in names]
        masks = sum(p.numel() // 8 for p in pruned)
        return int(copy + weight_bytes(source, model, names) + masks)

    def prepare(self, run: Run[Selection]) -> "ZeroWeights":
        """Return the removal itself: the whole model need not be known."""
        return self

    def findings(self, run: Run[Selection]) -> list[str]:
        """Return no findings."""
        return []

    def stages_of(self, inputs: BlockInputs) -> tuple[Stage, ...]:
        """Stages whose dense inputs will be read."""
        return inputs.stages

    def prune_block(
        self,
        task: Task,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        dense: DenseSide | None = None,
    ) -> PrunedBlock:
        """Prune the target linears of a block in place.

        Parameters
        ----------
        task
            How the block is run and measured.
        inputs
            The block, already on the task's device.
        on_layer
            Called after every matrix.
        dense
            The dense side of the block, with its inputs; by default a new one.
        """
        result = PrunedBlock()
        solve = partial(solve_stages, self, task, inputs, result, on_layer)
        if not task.staged:
            accumulators = collect_at_once(task, inputs)
            seen = list(zip(inputs.stages, accumulators, strict=True))
            # a block has more matrices to divide between ranks than a stage
            parts = [seen] if task.ranks.are_several else [[one] for one in seen]
            for part in parts:
                solve(part)
            return result
        dense = dense or DenseSide(inputs, inputs.stages, task.device)
        pruned = PrunedSide(inputs, task.device, dense)
        for index, stage in enumerate(inputs.stages):
            same = index == 0 and inputs.pruned is inputs.dense
            accumulator = collect_pair(task, inputs, dense, None if same else pruned, stage)
            dense.forget(stage)
            solve([(stage, accumulator)])
            with timed("forward"):
                pruned.settle(stage)
        return result

    def finish(self, run: Run[Selection], store: BlockStore) -> Removed:
        """Weights and masks of all matrices, each read from the store when it is used."""
        return Removed(
            masks=run.selection.by_parameter(partial(store.read_tensor, MASK)),
            weights=run.selection.by_parameter(partial(store.read_tensor, WEIGHT)),
        )

    def recipe_fields(self) -> dict[str, Any]:
        """Fields of a recipe that describe this removal."""
        pattern = self.pattern
        exact = str(pattern) if isinstance(pattern, NM) else None
        return {
            **self.method.recipe_fields(),
            "sparsity": exact or getattr(pattern, "sparsity", None),
            "group": getattr(pattern, "group", "row"),
            "keep_zeros": bool(self.keep_zeros),
        }


def choose_pattern(
    sparsity: float | str | None, pattern: Any = None, group: str | None = None
) -> Pattern:
    """Return the pattern that the arguments describe; a conflict is an error.

    Parameters
    ----------
    sparsity
        Fraction of zeros, or ``"n:m"``.
    pattern
        A pattern or ``"n:m"``, instead of `sparsity`.
    group
        Whether a fraction of zeros holds for every ``"row"`` or ``"layer"``.
    """
    if isinstance(pattern, str):
        pattern = parse_pattern(pattern)
    if not isinstance(pattern, Pattern | None):
        message = f'pattern is "n:m" or a Pattern, got {pattern!r}; or give sparsity'
        raise UsageError(message)
    if sparsity is None:
        if pattern is None:
            message = 'say how much to prune: sparsity=0.5, or "2:4" (keeps 2 of every 4)'
            raise UsageError(message)
        return _grouped(pattern, group)
    given = parse_pattern(str(sparsity))
    if pattern is None:
        return _grouped(given, group)
    if isinstance(given, NM):
        agree = given == pattern
    else:
        difference = getattr(given, "sparsity", 0) - getattr(pattern, "sparsity", -1)
        agree = abs(difference) < ROUNDING
    if not agree:
        message = f"sparsity {given} contradicts the pattern {pattern}; give one of them"
        raise UsageError(message)
    return _grouped(pattern, group)


def _grouped(pattern: Pattern, group: str | None) -> Pattern:
    """Pattern with zeros counted per group; an n:m pattern has a group of its own."""
    if group is None or group == getattr(pattern, "group", "row"):
        return pattern
    if not isinstance(pattern, Unstructured):
        message = (
            f"group {group} cannot be combined with the pattern {pattern}: leave one of "
            f"them out"
        )
        raise UsageError(message)
    return replace(pattern, group=group)  # type: ignore[arg-type]  # checked there


def refuse_impossible(method: Method, pattern: Pattern) -> None:
    """Refuse a method that cannot solve a tiny problem with the pattern."""
    if not isinstance(pattern, NM | Unstructured):
        return
    width = pattern.m if isinstance(pattern, NM) else 4
    problem = LayerProblem.from_moments(
        torch.ones(2, width),  # whose masks may differ
        Moments(torch.eye(width, dtype=torch.float64)),
        pattern=pattern,
        damping=method.damping,
    )
    refuse_unless_solvable(method.solver, problem)

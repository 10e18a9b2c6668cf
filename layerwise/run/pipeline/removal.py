"""Kinds of removal, and the interface that each of them implements.

A kind of removal is one class. :class:`~layerwise.run.pipeline.zeros.ZeroWeights` sets
single weights to zero, :class:`~layerwise.run.channels.removal.RemoveChannels` makes a
model smaller. A new kind is a new class, named in ``REMOVALS`` of
:mod:`layerwise.run.settings`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

from torch import Tensor

from layerwise.adapters import Stage
from layerwise.patterns import Pattern
from layerwise.run.activations.block import BlockInputs
from layerwise.run.activations.dense_side import DenseSide
from layerwise.run.data.calibration import Calibration
from layerwise.run.models.opening import OpenedModel
from layerwise.run.models.stock import OutputFormat
from layerwise.run.models.stored_types import RunTypes
from layerwise.run.models.surgery import Cut
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.store import BlockStore, MemoryStore, States
from layerwise.run.pipeline.targets import Selected
from layerwise.run.pipeline.task import Task

S = TypeVar("S", bound=Selected)


@dataclass(frozen=True)
class Amount:
    """Arguments that say what a run removes, and how much; None if not given.

    Parameters
    ----------
    sparsity, pattern, group
        As in :func:`layerwise.prune_model`.
    allocation, format, multiple
        The same, for smaller models.
    keep_zeros
        The same, for zeros only.
    """

    sparsity: float | str | None = None
    pattern: Any = None
    group: str | None = None
    allocation: str | None = None
    format: str | None = None
    multiple: int | None = None
    keep_zeros: bool | None = None

    def given(self, *names: str) -> Iterator[str]:
        """Those of the named arguments that were given."""
        return (name for name in names if getattr(self, name) is not None)


def ignore_note(text: str) -> None:
    """Take a remark for the log, and do nothing."""


@dataclass(frozen=True, eq=False)
class Run(Generic[S]):
    """A run that may begin: everything is checked.

    Parameters
    ----------
    opened
        The model.
    selection
        Its linears or channels that take part.
    task
        How every block is run and measured.
    tokens
        All calibration data.
    own_tokens
        Calibration data of this rank.
    output
        Output folder, or None.
    on_note
        Receives remarks for the log while something takes long.
    states
        Keeps what is found out before the first block, for a resumed run.
    """

    opened: OpenedModel
    selection: S
    task: Task
    tokens: Calibration
    own_tokens: Calibration
    output: Path | None = None
    on_note: Callable[[str], None] = ignore_note
    states: States = field(default_factory=MemoryStore)

    @property
    def stored_weights(self) -> Mapping[str, Tensor]:
        """Weights that a file gets back in another type than the model has, by name."""
        return {} if self.output is None else self.opened.stored_weights


@dataclass(frozen=True, eq=False)
class Shrunk:
    """Description of a model that has lost parameters, for writing it.

    Parameters
    ----------
    cuts
        Channels that every block keeps.
    format
        ``"stock"``, ``"native"`` or ``"padded"``.
    before
        Hash of every tensor of the dense model, by name; empty without an output.
    parameters_before, parameters_after
        Number of parameters of the decoder blocks.
    predicted_loss, price
        Predicted growth of the mean loss of a token for the optimised widths, and its slope
        per parameter; None if no widths were optimised.
    types
        Types of a model that now has those of its files, to be restored after writing.
    """

    cuts: Sequence[Cut]
    format: OutputFormat
    before: Mapping[str, str]
    parameters_before: int
    parameters_after: int
    predicted_loss: float | None = None
    price: float | None = None
    types: RunTypes | None = None


@dataclass(frozen=True, eq=False)
class Removed:
    """Result of a run for the whole model.

    Parameters
    ----------
    masks
        Mask of every pruned weight, by parameter name and in its shape, True = kept.
    weights
        New values of the parameters, likewise; empty for a smaller model.
    shrunk
        Description of a smaller model, or None.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    shrunk: Shrunk | None = None

    @property
    def parameters_left(self) -> float:
        """Remaining fraction of the parameters of the decoder blocks."""
        if self.shrunk is None:
            return 1.0
        return self.shrunk.parameters_after / self.shrunk.parameters_before


class BlockStep(Protocol):
    """Step that prunes one block after another."""

    def stages_of(self, inputs: BlockInputs) -> tuple[Stage, ...]:
        """Stages of a block that are pruned; their dense inputs are read."""
        ...

    def prune_block(
        self,
        task: Task,
        inputs: BlockInputs,
        on_layer: OnLayer = lambda record: None,
        dense: DenseSide | None = None,
    ) -> PrunedBlock:
        """Prune a block in place.

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
        ...


class Prepared(BlockStep, Protocol[S]):
    """A removal that has gathered all information about the whole model."""

    def findings(self, run: Run[S]) -> list[str]:
        """Findings about the model, for the log."""
        ...

    def finish(self, run: Run[S], store: BlockStore) -> Removed:
        """Return the result of all finished blocks; nothing is written here."""
        ...


class Removal(Protocol[S]):
    """What a run removes from a model, and by which method."""

    @classmethod
    def names(cls) -> Sequence[str]:
        """Values of the argument `pattern` that mean this kind of removal.

        The recipe and the fingerprint of a run hold the name, so no two kinds may share it.
        """
        ...

    @property
    def method(self) -> Method:
        """Method that solves the matrices."""
        ...

    @property
    def pattern(self) -> Pattern | None:
        """Pattern of the zeros in every matrix; None if the run does not make zeros."""
        ...

    @property
    def needs_whole_model(self) -> bool:
        """Whether the blocks cannot be loaded one by one."""
        ...

    @property
    def refused_by_ranks(self) -> str | None:
        """Why several ranks cannot share the run, or None."""
        ...

    @classmethod
    def from_arguments(cls, method: Method, amount: Amount) -> Self | None:
        """Create the removal from the arguments of a run; None if they mean another kind.

        Raises
        ------
        UsageError, InvalidProblemError
            The arguments contradict each other, or the method cannot do it.
        """
        ...

    def check_storable(self) -> None:
        """Refuse a result that cannot be written to a folder."""
        ...

    def for_model(self, model_type: str, *, ours: bool = False) -> Self:
        """Return the removal with what its paper prescribes for a family of models.

        Parameters
        ----------
        model_type
            The family.
        ours
            Whether layerwise wrote the model.
        """
        ...

    def select(
        self, opened: OpenedModel, targets: Sequence[str], ignore: Sequence[str]
    ) -> S:
        """Select the linears or channels that take part; refuse an unsuitable model."""
        ...

    def notes(self, run: Run[S]) -> list[str]:
        """Remarks for the log before the run."""
        ...

    def disk_needed(self, run: Run[S]) -> int:
        """Bytes that the output will need, as far as they are known before the run."""
        ...

    def prepare(self, run: Run[S]) -> Prepared[S]:
        """Gather information about the whole model before the first block."""
        ...

    def recipe_fields(self) -> dict[str, Any]:
        """Fields of a recipe by which :meth:`from_arguments` creates this removal again.

        A kind with a name gives it as ``pattern``. ``sparsity`` is checked by ``layerwise
        verify``: the fraction of zeros in every matrix, or ``"n:m"``; 0 for none.
        """
        ...

"""What a run removes: the kinds of removal, and what one needs to know and to give.

A kind of removal is one class. :class:`~layerwise.run.pipeline.zeros.ZeroWeights` sets
single weights to zero, :class:`~layerwise.run.channels.removal.RemoveChannels` makes a
model smaller. A new kind is a new class, named in ``REMOVALS`` of
:mod:`layerwise.run.settings`.
"""

from collections.abc import Iterator, Mapping, Sequence
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
from layerwise.run.models.surgery import Cut
from layerwise.run.pipeline.method import Method
from layerwise.run.pipeline.results import OnLayer, PrunedBlock
from layerwise.run.pipeline.store import BlockStore
from layerwise.run.pipeline.targets import Choice
from layerwise.run.pipeline.task import Task

S = TypeVar("S", bound=Choice)


@dataclass(frozen=True)
class Amount:
    """How much of what a run removes, as its arguments say; None where left out.

    Parameters
    ----------
    sparsity, pattern, group
        As in :func:`layerwise.prune_model`.
    allocation, format, multiple
        The same, of smaller models.
    """

    sparsity: float | str | None = None
    pattern: Any = None
    group: str | None = None
    allocation: str | None = None
    format: str | None = None
    multiple: int | None = None

    def given(self, *names: str) -> Iterator[str]:
        """Those of some arguments that were not left out."""
        return (name for name in names if getattr(self, name) is not None)


@dataclass(frozen=True, eq=False)
class Run(Generic[S]):
    """A run that may begin: everything was checked.

    Parameters
    ----------
    opened
        The model.
    selection
        What of it takes part.
    task
        How every block is run and measured.
    tokens
        The calibration data, all of it.
    own_tokens
        Those of this rank.
    output
        Folder that is written, or None.
    """

    opened: OpenedModel
    selection: S
    task: Task
    tokens: Calibration
    own_tokens: Calibration
    output: Path | None = None


@dataclass(frozen=True, eq=False)
class Shrunk:
    """A model that has lost parameters, for those who write it.

    Parameters
    ----------
    cuts
        What was removed from every block.
    format
        ``"stock"``, ``"native"`` or ``"padded"``.
    before
        Hash of every tensor of the model as it was, by name; empty without an output.
    parameters_before, parameters_after
        Of the decoder blocks.
    predicted_loss, price
        Growth of the mean loss of a token that the optimised widths should cost, and its
        slope per parameter; None where no widths were optimised.
    """

    cuts: Sequence[Cut]
    format: OutputFormat
    before: Mapping[str, str]
    parameters_before: int
    parameters_after: int
    predicted_loss: float | None = None
    price: float | None = None


@dataclass(frozen=True, eq=False)
class Removed:
    """What is there at the end of a run.

    Parameters
    ----------
    masks
        Mask of every pruned weight, by parameter name and in its shape, True = kept.
    weights
        New values of the parameters, likewise; empty for a model that is smaller.
    shrunk
        How the model is smaller, or None.
    """

    masks: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    shrunk: Shrunk | None = None

    @property
    def parameters_left(self) -> float:
        """Fraction of the parameters of the decoder blocks that is still there."""
        if self.shrunk is None:
            return 1.0
        return self.shrunk.parameters_after / self.shrunk.parameters_before


class BlockStep(Protocol):
    """What is done to one block after another."""

    def stages_of(self, inputs: BlockInputs) -> tuple[Stage, ...]:
        """Stages of a block whose dense inputs will be read."""
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
            What a pass through the dense block has kept; by default it is made anew.
        """
        ...


class Prepared(BlockStep, Protocol[S]):
    """A removal that knows all it must know of the model."""

    def findings(self, run: Run[S]) -> list[str]:
        """What was learnt of the model, for the log."""
        ...

    def finish(self, run: Run[S], store: BlockStore) -> Removed:
        """Return what the finished blocks make of the model; nothing is written here."""
        ...


class Removal(Protocol[S]):
    """What a run removes from a model, and by which method."""

    @property
    def method(self) -> Method:
        """How the matrices are solved."""
        ...

    @property
    def pattern(self) -> Pattern | None:
        """Pattern of the zeros in every matrix; None if no zeros are what is removed."""
        ...

    @property
    def needs_whole_model(self) -> bool:
        """Whether the blocks cannot be loaded one by one."""
        ...

    @property
    def refused_by_ranks(self) -> str | None:
        """Why several ranks cannot share this, or None."""
        ...

    @classmethod
    def asked(cls, method: Method, amount: Amount) -> Self | None:
        """Return what the arguments of a run ask for, or None if it is another kind.

        Raises
        ------
        UsageError, InvalidProblemError
            The arguments contradict each other, or the method cannot do it.
        """
        ...

    def check_storable(self) -> None:
        """Refuse what no folder can hold."""
        ...

    def for_model(self, model_type: str) -> Self:
        """Return it with what a paper prescribes for a family of models."""
        ...

    def select(
        self, opened: OpenedModel, targets: Sequence[str], ignore: Sequence[str]
    ) -> S:
        """Choose what takes part; whatever cannot be done to this model is refused."""
        ...

    def notes(self, run: Run[S]) -> list[str]:
        """What a reader of the log should know before the run."""
        ...

    def disk_needed(self, run: Run[S]) -> int:
        """Bytes that the output will need, as far as they are known."""
        ...

    def prepare(self, run: Run[S]) -> Prepared[S]:
        """Learn all that must be known of the whole model before the first block."""
        ...

    def recipe_fields(self) -> dict[str, Any]:
        """Fields of a recipe that ask for this again."""
        ...

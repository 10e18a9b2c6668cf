"""Declaration of an architecture: the names of its blocks and linears.

An adapter is only a declaration. It names the list of decoder blocks and, for a block, the
*stages* in the order of the data flow. A stage is a group of linear layers that read the
same inputs, and so share one gram. An adapter does not depend on methods, and the call of a
block is recorded from the model (see :mod:`layerwise.run.activations.streams`).
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from layerwise.adapters.couplings import Coupling
from layerwise.adapters.linear import is_linear, matrix
from layerwise.errors import UnsupportedModelError


@dataclass(frozen=True)
class OutputSlice:
    """Inputs that are the first channels of the output of another module of the block.

    Needed if a model uses the weight of a linear without calling the layer, because then a
    hook on the layer never runs. The number of channels is that of the linear's inputs.

    Parameters
    ----------
    module
        Name of the other module, relative to the block.
    """

    module: str


@dataclass(frozen=True)
class Stage:
    """Linear layers that share their inputs.

    Parameters
    ----------
    linears
        Names relative to the block.
    source
        Source of the inputs; None: the call of the first linear.
    """

    linears: tuple[str, ...]
    source: OutputSlice | None = None

    def only(self, names: Collection[str]) -> "Stage":
        """Return the stage without the linears that are not in `names`."""
        kept = tuple(name for name in self.linears if name in names)
        return replace(self, linears=kept)


@dataclass(frozen=True)
class Adapter:
    """Declaration of an architecture family, or of one model.

    Parameters
    ----------
    name
        Name of the family, for messages.
    blocks
        Dotted name of the ``ModuleList`` of decoder blocks.
    stages
        Stages of a block in the order of the data flow.
    by_block
        Stages of blocks that differ from `stages`, by the full name of the block.
    unserved
        Reason for every weight inside the blocks that cannot be pruned, by full name. A
        run is refused unless the user excludes these weights.
    found
        Whether the adapter was derived by running a model, see
        :mod:`layerwise.adapters.auto`.
    couplings
        Channels that can be removed from a block, see :mod:`layerwise.adapters.couplings`.
    """

    name: str
    blocks: str
    stages: tuple[Stage, ...]
    by_block: Mapping[str, tuple[Stage, ...]] = field(default_factory=dict)
    unserved: Mapping[str, str] = field(default_factory=dict)
    found: bool = False
    couplings: tuple[Coupling, ...] = ()

    def blocks_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """Decoder blocks by full name, in order; every declared name is checked.

        Raises
        ------
        UnsupportedModelError
            If the model does not have the declared structure.
        """
        try:
            blocks = model.get_submodule(self.blocks)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            message = (
                f"the {self.name} adapter expects the decoder blocks at {self.blocks!r}, "
                f"but this {type(model).__name__} has none there"
            )
            raise UnsupportedModelError(message)
        by_name = {f"{self.blocks}.{index}": block for index, block in enumerate(blocks)}
        for block_name, block in by_name.items():
            for stage in self.stages_of(block_name):
                for linear in stage.linears:
                    self.linear(block, linear, block_name)
                if stage.source is not None:
                    self._check_source(block, stage.source, block_name)
        return by_name

    def stages_of(self, block_name: str) -> tuple[Stage, ...]:
        """Stages of a block by its full name."""
        return self.by_block.get(block_name, self.stages)

    def linear_names(self, block_name: str) -> tuple[str, ...]:
        """Names of all prunable linears of a block, relative to it."""
        return tuple(n for stage in self.stages_of(block_name) for n in stage.linears)

    def linear(self, block: nn.Module, name: str, block_name: str = "block") -> nn.Module:
        """One linear layer of a block."""
        module = _submodule(block, name)
        if module is None or not is_linear(module):
            message = (
                f"the {self.name} adapter expects a Linear at {block_name}.{name}, found "
                f"{_kind(module)}"
            )
            raise UnsupportedModelError(message)
        return module

    def weight(self, block: nn.Module, name: str) -> Tensor:
        """Weight of a linear, shape (out, in); writing to it writes to the layer."""
        return matrix(self.linear(block, name))

    def _check_source(self, block: nn.Module, source: OutputSlice, block_name: str) -> None:
        if _submodule(block, source.module) is None:
            message = (
                f"the {self.name} adapter expects a module at "
                f"{block_name}.{source.module}, found nothing: use a version of "
                f"transformers that has it"
            )
            raise UnsupportedModelError(message)


def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _kind(module: nn.Module | None) -> str:
    return "nothing" if module is None else type(module).__name__

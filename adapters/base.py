"""What the run must know about an architecture: where its blocks and linears are.

An adapter is a declaration and nothing else. It names the list of decoder blocks and, for
a block, the *stages* in the order in which data flow through them: a stage is a group of
linear layers that read the same inputs, and so share one gram. An adapter knows nothing
of methods, and how a block is called is taken from the model itself (see
:mod:`layerwise.run.streams`).
"""

from dataclasses import dataclass

from torch import nn

from layerwise.errors import UnsupportedModelError


@dataclass(frozen=True)
class Stage:
    """Linear layers that share their inputs, by name relative to the block."""

    linears: tuple[str, ...]


@dataclass(frozen=True)
class Adapter:
    """Declaration of an architecture family.

    Parameters
    ----------
    name
        The family, for messages.
    blocks
        Dotted name of the ``ModuleList`` of decoder blocks.
    stages
        Stages of a block in the order of the data flow.
    """

    name: str
    blocks: str
    stages: tuple[Stage, ...]

    def blocks_of(self, model: nn.Module) -> dict[str, nn.Module]:
        """Decoder blocks by full name, in order; every declared linear is checked.

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
        found = {f"{self.blocks}.{index}": block for index, block in enumerate(blocks)}
        for block_name, block in found.items():
            for linear in self.linear_names():
                self.linear(block, linear, block_name)
        return found

    def linear_names(self) -> tuple[str, ...]:
        """Names of all prunable linears of a block, relative to it."""
        return tuple(name for stage in self.stages for name in stage.linears)

    def linear(self, block: nn.Module, name: str, block_name: str = "block") -> nn.Linear:
        """One linear of a block."""
        try:
            module = block.get_submodule(name)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear):
            kind = "nothing" if module is None else type(module).__name__
            message = (
                f"the {self.name} adapter expects a Linear at {block_name}.{name}, found "
                f"{kind}"
            )
            raise UnsupportedModelError(message)
        return module

"""Which linears to prune: ``targets`` minus ``ignore``, over the blocks of a model.

Entries are those of :mod:`layerwise.run.entries`. One that matches nothing is an error
that lists what is there, because a run that silently prunes nothing is the most expensive
kind.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from layerwise.adapters import Adapter, Stage
from layerwise.adapters.linear import is_transposed, matrix
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.patterns import Pattern
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.checkpoints.unprunable import refuse_shared, refuse_unserved
from layerwise.run.entries import matches

DEFAULT_IGNORE = ("lm_head",)  # need not exist


class Choice(Protocol):
    """What a selection tells the run, of single weights or of channels."""

    @property
    def blocks(self) -> Mapping[str, nn.Module]:
        """All decoder blocks by full name, in order."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Full names of the linears that will be written."""
        ...

    def stages_of(self, block: str) -> tuple[Stage, ...]:
        """Stages of a block with the chosen linears alone."""
        ...


class Selection:
    """Which linears of which blocks are pruned, checked against the pattern."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        targets: Sequence[str],
        ignore: Sequence[str],
        pattern: Pattern,
    ) -> None:
        self.targets, self.ignore = targets, ignore
        self.blocks = adapter.blocks_of(model)
        self._adapter = adapter
        candidates = {
            f"{block}.{name}": adapter.linear(module, name)
            for block, module in self.blocks.items()
            for name in adapter.linear_names(block)
        }
        modules = dict(model.named_modules())
        unserved = {  # a linear itself, or the module that holds a parameter
            name: modules.get(name) or modules[name.rpartition(".")[0]]
            for name in adapter.unserved
        }
        refuse_unserved(model, adapter, unserved, targets, ignore)
        self.names = select({**modules, **unserved}, candidates, targets, ignore)
        refuse_shared(model, self.names)
        self.transposed = {name for name in self.names if is_transposed(candidates[name])}
        for name in self.names:
            rows, columns = matrix(candidates[name]).shape
            try:
                pattern.check((rows, columns))
            except InvalidProblemError as error:
                message = f"{name}: {error}"
                raise InvalidProblemError(message) from None

    def stages_of(self, block: str) -> tuple[Stage, ...]:
        """Stages of a block with the chosen linears alone."""
        prefix = f"{block}."
        chosen = {
            name.removeprefix(prefix) for name in self.names if name.startswith(prefix)
        }
        stages = [stage.only(chosen) for stage in self._adapter.stages_of(block)]
        return tuple(stage for stage in stages if stage.linears)

    def by_parameter(self, read: Callable[[int, str], Tensor]) -> LazyTensors:
        """Matrices by weight parameter and in its orientation.

        Parameters
        ----------
        read
            Gives the matrix (out, in) of a linear of the block with an index.
        """
        places = {
            f"{block}.{linear}": (index, linear)
            for index, block in enumerate(self.blocks)
            for linear in self._adapter.linear_names(block)
        }

        def oriented(parameter: str) -> Tensor:
            name = parameter.removesuffix(".weight")
            tensor = read(*places[name])
            return tensor.T.contiguous() if name in self.transposed else tensor

        return LazyTensors([f"{name}.weight" for name in self.names], oriented)

    def share(self, model: nn.Module) -> float:
        """Fraction of the parameters of the blocks that the chosen linears hold."""
        blocks = [p for block in self.blocks.values() for p in block.parameters()]
        chosen = [model.get_parameter(f"{name}.weight") for name in self.names]
        return sum(p.numel() for p in chosen) / sum(p.numel() for p in blocks)


def select(
    modules: Mapping[str, nn.Module],
    candidates: Mapping[str, nn.Module],
    targets: Sequence[str],
    ignore: Sequence[str],
) -> list[str]:
    """Names of the candidates to prune, in order.

    Parameters
    ----------
    modules
        Everything that an `ignore` entry may name.
    candidates
        Prunable linears by full name.
    targets, ignore
        Entries as described above.

    Raises
    ------
    UsageError
        If an entry matches nothing, or nothing is left.
    """
    for entry in targets:
        if not any(matches(entry, name, module) for name, module in candidates.items()):
            raise UsageError(_no_match("targets", entry, candidates))
    for entry in ignore:
        if entry not in DEFAULT_IGNORE and not any(
            matches(entry, name, module) for name, module in modules.items()
        ):
            raise UsageError(_no_match("ignore", entry, candidates))
    chosen = [
        name
        for name, module in candidates.items()
        if any(matches(entry, name, module) for entry in targets)
        and not any(matches(entry, name, module) for entry in ignore)
    ]
    if not chosen:
        message = (
            f"nothing is left to prune: ignore={list(ignore)} excludes all of "
            f"{_listing(candidates)}"
        )
        raise UsageError(message)
    return chosen


def _no_match(argument: str, entry: str, candidates: Mapping[str, nn.Module]) -> str:
    close = difflib.get_close_matches(entry, candidates, n=1)
    hint = f"; close: {close[0]}" if close else ""
    return f"{argument} entry {entry!r} matches nothing in {_listing(candidates)}{hint}"


def _listing(candidates: Mapping[str, nn.Module]) -> str:
    names = list(candidates)
    kinds = sorted({type(module).__name__ for module in candidates.values()})
    shown = ", ".join(names[:8]) + (
        f", and {len(names) - 8} more" if len(names) > 8 else ""
    )
    return f"{shown} (class {', '.join(kinds)})"

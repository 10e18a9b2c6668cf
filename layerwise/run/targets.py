"""Which linears to prune: ``targets`` minus ``ignore``, over the blocks of a model.

An entry is a class name (``Linear``), an exact module name, or ``re:`` and a regular
expression that must match from the start of the module name. An entry that matches
nothing is an error that lists what is there, because a run that silently prunes nothing
is the most expensive kind.
"""

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from layerwise.adapters import Adapter
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.patterns import Pattern

DEFAULT_IGNORE = ("lm_head",)  # need not exist


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
        candidates = {
            f"{block}.{name}": adapter.linear(module, name)
            for block, module in self.blocks.items()
            for name in adapter.linear_names()
        }
        self.names = select(model, candidates, targets, ignore)
        for name in self.names:
            linear = candidates[name]
            try:
                pattern.check((linear.out_features, linear.in_features))
            except InvalidProblemError as error:
                message = f"{name}: {error}"
                raise InvalidProblemError(message) from None

    def targets_of(self, block: str) -> frozenset[str]:
        """Names of the targets of a block, relative to it."""
        prefix = f"{block}."
        return frozenset(
            name.removeprefix(prefix) for name in self.names if name.startswith(prefix)
        )

    def by_parameter(self, parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of all blocks by the name of the weight parameter."""
        found = {
            f"{block}.{name}": tensor
            for block, part in zip(self.blocks, parts, strict=True)
            for name, tensor in part.items()
        }
        return {f"{name}.weight": found[name] for name in self.names}


def select(
    model: nn.Module,
    candidates: Mapping[str, nn.Module],
    targets: Sequence[str],
    ignore: Sequence[str],
) -> list[str]:
    """Names of the candidates to prune, in order.

    Parameters
    ----------
    model
        The model, whose other modules an `ignore` entry may name.
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
        if not any(_matches(entry, name, module) for name, module in candidates.items()):
            raise UsageError(_no_match("targets", entry, candidates))
    everything = dict(model.named_modules())
    for entry in ignore:
        if entry not in DEFAULT_IGNORE and not any(
            _matches(entry, name, module) for name, module in everything.items()
        ):
            raise UsageError(_no_match("ignore", entry, candidates))
    chosen = [
        name
        for name, module in candidates.items()
        if any(_matches(entry, name, module) for entry in targets)
        and not any(_matches(entry, name, module) for entry in ignore)
    ]
    if not chosen:
        message = (
            f"nothing is left to prune: ignore={list(ignore)} excludes all of "
            f"{_listing(candidates)}"
        )
        raise UsageError(message)
    return chosen


def _matches(entry: str, name: str, module: nn.Module) -> bool:
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], name) is not None
        except re.error as error:
            message = f"{entry!r} is no regular expression: {error}"
            raise UsageError(message) from None
    return entry == name or entry == type(module).__name__


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

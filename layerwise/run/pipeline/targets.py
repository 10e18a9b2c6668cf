"""Selection of the linears to prune: ``targets`` without ``ignore``, in all blocks.

Entries are those of :mod:`layerwise.run.pipeline.judgement`. One that matches nothing is
an error that lists the names in the model, because a run that silently prunes nothing is
the most expensive kind.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from layerwise.adapters import Adapter, Stage
from layerwise.adapters.linear import is_transposed
from layerwise.errors import InvalidProblemError, UnsupportedModelError, UsageError
from layerwise.patterns import Pattern
from layerwise.run.checkpoints.lazy import LazyTensors
from layerwise.run.pipeline.judgement import (
    ANY_LINEAR,
    Judgement,
    left_dense,
    matches,
    names_of,
    other_name,
)

__all__ = [
    "ANY_LINEAR",
    "Selected",
    "Selection",
    "matches",
    "note_on",
    "refuse_shared",
    "refuse_unserved",
    "select",
]

DEFAULT_IGNORE = ("lm_head",)  # need not exist


class Selected(Protocol):
    """Linears that a run selected, to prune single weights or channels."""

    @property
    def blocks(self) -> Mapping[str, nn.Module]:
        """All decoder blocks by full name, in order."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Full names of the linears that will be written."""
        ...

    @property
    def targets(self) -> Sequence[str]:
        """Entries that select them."""
        ...

    @property
    def ignore(self) -> Sequence[str]:
        """Entries that leave some out."""
        ...

    def stages_of(self, block: str) -> tuple[Stage, ...]:
        """Stages of a block with the selected linears only."""
        ...


class Selection:
    """Linears of the blocks that are pruned, checked against the pattern."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        targets: Sequence[str],
        ignore: Sequence[str],
        pattern: Pattern | None = None,
    ) -> None:
        self.targets, self.ignore = targets, ignore
        self.blocks = adapter.blocks_of(model)
        self._adapter = adapter
        judgement = Judgement(model, adapter, targets, ignore, pattern)
        candidates = judgement.candidates
        refuse_unserved(model, adapter, judgement)
        named = {**dict(model.named_modules()), **judgement.unserved}
        self.names = select(named, candidates, targets, ignore)
        for name in self.names:
            verdict = judgement.of_linear(name)
            if verdict.status == "refused":  # by the pattern: nothing is shared
                message = f"{name}: {verdict.reason}"
                raise InvalidProblemError(message)
        self.transposed = {name for name in self.names if is_transposed(candidates[name])}

    def stages_of(self, block: str) -> tuple[Stage, ...]:
        """Stages of a block with the selected linears only."""
        prefix = f"{block}."
        chosen = {
            name.removeprefix(prefix) for name in self.names if name.startswith(prefix)
        }
        stages = [stage.only(chosen) for stage in self._adapter.stages_of(block)]
        return tuple(stage for stage in stages if stage.linears)

    def by_parameter(self, read: Callable[[int, str], Tensor]) -> LazyTensors:
        """Matrices by the name of their parameter, and in its orientation.

        Parameters
        ----------
        read
            Returns the matrix (out, in) of a linear, by index of the block and name.
        """
        linears = {
            f"{block}.{linear}": (index, linear)
            for index, block in enumerate(self.blocks)
            for linear in self._adapter.linear_names(block)
        }

        def oriented(parameter: str) -> Tensor:
            name = parameter.removesuffix(".weight")
            tensor = read(*linears[name])
            return tensor.T.contiguous() if name in self.transposed else tensor

        return LazyTensors([f"{name}.weight" for name in self.names], oriented)


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
        If an entry matches nothing, or no linear is selected.
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
        if left_dense(name, module, targets, ignore) is None
    ]
    if not chosen:
        message = (
            f"nothing is left to prune: ignore={list(ignore)} excludes all of "
            f"{_listing(candidates)}; ignore fewer"
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


def note_on(model: nn.Module, adapter: Adapter, selection: Selected) -> str:
    """Note on a run for an architecture without declared adapter."""
    blocks = [p for block in selection.blocks.values() for p in block.parameters()]
    chosen = [model.get_parameter(f"{name}.weight") for name in selection.names]
    share = sum(p.numel() for p in chosen) / sum(p.numel() for p in blocks)
    return (
        f"no adapter is declared for this {type(model).__name__}: blocks "
        f"{adapter.blocks} were found by running it; the {len(selection.names)} layers "
        f"to prune hold {share:.1%} of their parameters"
    )


def refuse_shared(model: nn.Module, names: Sequence[str]) -> None:
    """Raise if weights to prune share memory with others, or their entries do."""
    if reasons := _shared(model, names):
        message = f"{len(reasons)} weights cannot be pruned{_listed(reasons)}"
        raise UnsupportedModelError(message)


def refuse_unserved(model: nn.Module, adapter: Adapter, judgement: Judgement) -> None:
    """Raise if the entries select weights that are shared or that no adapter can prune."""
    reasons = {
        name: adapter.unserved[name]
        for name in judgement.unserved
        if judgement.of_unserved(name).status == "refused"
    }
    chosen = [n for n in judgement.candidates if judgement.of_linear(n).status != "dense"]
    reasons |= _shared(model, chosen)
    if not reasons:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = [parameters.get(n, parameters.get(f"{n}.weight")) for n in reasons]
    sizes = {id(p): p.numel() for p in found if p is not None}
    prefix = f"{adapter.blocks}."
    inside = {id(p): p.numel() for n, p in parameters.items() if n.startswith(prefix)}
    message = (
        f"{len(reasons)} weights of the blocks, "
        f"{sum(sizes.values()) / sum(inside.values()):.1%} of their parameters, cannot be "
        f"pruned{_listed(reasons)}"
    )
    raise UnsupportedModelError(message)


def _shared(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Reason for every named linear whose entries are shared, among each other or not."""
    known = names_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    reasons = {}
    for name in names:
        weight = f"{name}.weight"
        if (other := other_name(known[weight], weight)) is not None:
            reasons[name] = f"one tensor with {other}"
        elif 0 in parameters[weight].stride():
            reasons[name] = "expanded, so that entries share their memory: clone it"
    return reasons


def _listed(reasons: Mapping[str, str]) -> str:
    """Some weights with their reasons, and the entries that leave all of them dense."""
    kinds: dict[str, str] = {}  # expression for all blocks -> first name
    for name in reasons:
        kinds.setdefault("re:" + r"\.\d+".join(re.split(r"\\\.\d+", re.escape(name))), name)
    shown = [f"{name} ({reasons[name]})" for name in kinds.values()]
    return (
        f", such as {', '.join(shown[:3])}; to leave them dense, ignore {' '.join(kinds)}"
    )

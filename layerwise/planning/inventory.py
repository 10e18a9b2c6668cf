"""Every parameter of a model, and what a run would do to it and why.

The groups share out all parameters: none is missing, none is counted twice. A matrix
that would stop a run is named as such, with the words of the error.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from layerwise.adapters import Adapter
from layerwise.adapters.linear import is_linear, matrix
from layerwise.errors import InvalidProblemError
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.run.pipeline.targets import ANY_LINEAR, matches

Fate = Literal["pruned", "dense", "refused"]
OUTSIDE = "outside the decoder blocks"
VECTORS = "norms and biases"


@dataclass(frozen=True)
class Group:
    """Parameters of one kind that share their fate, alike in all blocks.

    Parameters
    ----------
    name
        Of the module, numbers of blocks and experts replaced by ``*``.
    members
        Full names.
    shape
        Of one of them: (out, in) of a linear, however it is stored.
    parameters
        Of all of them together; 0 for what is counted elsewhere.
    fate
        ``"pruned"``, left ``"dense"``, or ``"refused"``: a run would not start.
    reason
        Why it is not pruned; empty if it is.
    zeros
        Entries of all of them that the pattern removes.
    """

    name: str
    members: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    fate: Fate
    reason: str
    zeros: int = 0

    @property
    def count(self) -> int:
        """Number of members."""
        return len(self.members)


def zeros_of(pattern: Pattern, shape: tuple[int, int]) -> int:
    """Exact number of entries that a pattern removes from a matrix of this shape."""
    rows, width = shape
    if isinstance(pattern, Unstructured):
        if pattern.group == "row":
            return rows * pattern.removed(width)
        return pattern.removed(rows * width)
    if isinstance(pattern, NM):
        return rows * (width // pattern.m) * (pattern.m - pattern.n)
    if isinstance(pattern, FixedMask):
        return int((~pattern.kept).sum())
    message = f"the zeros of {pattern} are not those of single weights"
    raise InvalidProblemError(message)


def inventory(
    model: nn.Module,
    adapter: Adapter,
    targets: Sequence[str],
    ignore: Sequence[str],
    pattern: Pattern,
) -> list[Group]:
    """Groups of all parameters of a model, in its order.

    Parameters
    ----------
    model, adapter
        The model, on any device, and its declaration.
    targets, ignore
        Entries as in :mod:`layerwise.run.entries`.
    pattern
        What every pruned matrix must satisfy.
    """
    judge = _Judge(model, adapter, targets, ignore, pattern)
    found: dict[tuple[str, tuple[int, ...], Fate, str], list[str]] = {}
    sizes: dict[str, int] = {}
    seen: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(parameter), name)
        module, shape = judge.place(name)
        fate, reason = judge.fate(name, None if first == name else first)
        sizes[name] = parameter.numel() if first == name else 0
        key = (VECTORS, (), fate, reason) if len(shape) < 2 else (
            starred(module), shape, fate, starred(reason)
        )  # fmt: skip
        found.setdefault(key, []).append(name)
    return [
        Group(
            name,
            tuple(members),
            shape,
            sum(sizes[member] for member in members),
            fate,
            reason,
            len(members) * zeros_of(pattern, (shape[0], shape[1]))
            if fate == "pruned"
            else 0,
        )
        for (name, shape, fate, reason), members in found.items()
    ]


def starred(text: str) -> str:
    """Names with the numbers of blocks and experts replaced by a star."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", text)


class _Judge:
    """What happens to a parameter, by its name."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        targets: Sequence[str],
        ignore: Sequence[str],
        pattern: Pattern,
    ) -> None:
        self._modules = dict(model.named_modules())
        self._adapter, self._pattern = adapter, pattern
        self._targets, self._ignore = targets, ignore
        blocks = adapter.blocks_of(model)
        self._candidates = {
            f"{block}.{linear}"
            for block in blocks
            for linear in adapter.linear_names(block)
        }
        self._shapes = {
            name: tuple(parameter.shape)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        users: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            users.setdefault(id(parameter), []).append(name)
        self._others = {
            name: next(other for other in names if other != name)
            for names in users.values()
            if len(names) > 1
            for name in names
        }

    def place(self, parameter: str) -> tuple[str, tuple[int, ...]]:
        """Name to show for a parameter, and its shape, (out, in) for a linear."""
        owner, _, own = parameter.rpartition(".")
        module = self._modules[owner]
        if own == "weight" and is_linear(module):
            rows, width = matrix(module).shape
            return owner, (rows, width)
        shown = owner if own == "weight" else parameter
        return shown, self._shapes[parameter]

    def fate(self, parameter: str, first: str | None) -> tuple[Fate, str]:
        """Fate and reason; `first` is the name under which it was seen before."""
        owner, _, own = parameter.rpartition(".")
        module = self._modules[owner]
        inside = parameter.startswith(f"{self._adapter.blocks}.")
        if owner in self._candidates and own == "weight":
            return self._candidate(parameter, owner, module)
        if first is not None:
            return "dense", f"shared with {first}"
        if not inside:
            return "dense", OUTSIDE
        if len(self._shapes[parameter]) < 2:
            return "dense", "a vector"
        for name in (owner, parameter):
            if name in self._adapter.unserved:
                return self._unserved(name, module)
        if own == "weight" and is_linear(module):
            return "dense", f"not declared by the {self._adapter.name} adapter"
        return "dense", "not a linear layer"

    def _candidate(
        self, parameter: str, linear: str, module: nn.Module
    ) -> tuple[Fate, str]:
        for entry in self._ignore:
            if matches(entry, linear, module):
                return "dense", f"ignored by {entry!r}"
        if not any(matches(entry, linear, module) for entry in self._targets):
            return "dense", "not in targets"
        if (other := self._others.get(parameter)) is not None:
            return "refused", f"shared with {other}; ignore both"
        rows, width = matrix(module).shape
        try:
            self._pattern.check((rows, width))
        except InvalidProblemError as error:
            return "refused", str(error)
        return "pruned", ""

    def _unserved(self, name: str, module: nn.Module) -> tuple[Fate, str]:
        """A weight that the adapter cannot serve: refused unless it is left out."""
        why = self._adapter.unserved[name]
        for entry in self._ignore:
            if self._names(entry, name, module):
                return "dense", f"{why}; ignored by {entry!r}"
        if not any(self._names(entry, name, module) for entry in self._targets):
            return "dense", f"{why}; not in targets"
        return "refused", why

    @staticmethod
    def _names(entry: str, name: str, module: nn.Module) -> bool:
        parent = name.rpartition(".")[0]
        return matches(entry, name, module) or entry in (parent, ANY_LINEAR)


def by_shape(groups: Sequence[Group]) -> Mapping[str, tuple[int, int]]:
    """Shape of every matrix that is pruned, by the name of its linear."""
    return {
        member.removesuffix(".weight"): (group.shape[0], group.shape[1])
        for group in groups
        if group.fate == "pruned"
        for member in group.members
    }

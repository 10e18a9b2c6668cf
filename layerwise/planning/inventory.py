"""Every parameter of a model, what a run would do to it, and why.

The groups cover all parameters: none is missing, none is counted twice. A matrix that would
stop a run is marked, with the text of the error as its reason.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from layerwise.adapters import Adapter
from layerwise.adapters.linear import is_linear, matrix
from layerwise.errors import InvalidProblemError
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.run.pipeline.judgement import Judgement, Status

VECTORS = "norms and biases"


@dataclass(frozen=True)
class Group:
    """Parameters of one kind, in all blocks, that a run treats in the same way.

    Parameters
    ----------
    name
        Name of the module, with numbers of blocks and experts replaced by ``*``.
    members
        Full names.
    shape
        Shape of one member: (out, in) of a linear, however it is stored.
    parameters
        Number of parameters of all members; 0 for those counted elsewhere.
    status
        ``"pruned"``, left ``"dense"``, or ``"refused"``: a run would not start.
    reason
        Why the group is not pruned; empty if it is.
    zeros
        Entries of all members that the pattern removes.
    """

    name: str
    members: tuple[str, ...]
    shape: tuple[int, ...]
    parameters: int
    status: Status
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
    message = f"only patterns of single weights can be counted, got {pattern}: choose one"
    raise InvalidProblemError(message)


def inventory(
    model: nn.Module,
    adapter: Adapter,
    targets: Sequence[str],
    ignore: Sequence[str],
    pattern: Pattern,
) -> list[Group]:
    """Groups of all parameters of a model, in the order of the model.

    Parameters
    ----------
    model, adapter
        The model, on any device, and its declaration.
    targets, ignore
        Entries as in :mod:`layerwise.run.pipeline.judgement`.
    pattern
        Pattern that every pruned matrix must satisfy.
    """
    judgement = Judgement(model, adapter, targets, ignore, pattern)
    groups: dict[tuple[str, tuple[int, ...], Status, str], list[str]] = {}
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shown, shape = _name_and_shape(model, name)
        verdict = judgement.of_parameter(name)
        status, reason = verdict.status, verdict.reason
        sizes[name] = parameter.numel() if judgement.first_name(name) == name else 0
        key = (VECTORS, (), status, reason) if len(shape) < 2 else (
            starred(shown), shape, status, starred(reason)
        )  # fmt: skip
        groups.setdefault(key, []).append(name)
    return [
        Group(
            name,
            tuple(members),
            shape,
            sum(sizes[member] for member in members),
            status,
            reason,
            len(members) * zeros_of(pattern, (shape[0], shape[1]))
            if status == "pruned"
            else 0,
        )
        for (name, shape, status, reason), members in groups.items()
    ]


def _name_and_shape(model: nn.Module, parameter: str) -> tuple[str, tuple[int, ...]]:
    """Displayed name of a parameter, and its shape, (out, in) for a linear."""
    owner, _, own = parameter.rpartition(".")
    module = model.get_submodule(owner)
    if own != "weight":
        return parameter, tuple(model.get_parameter(parameter).shape)
    weight = matrix(module) if is_linear(module) else model.get_parameter(parameter)
    return owner, tuple(weight.shape)


def starred(text: str) -> str:
    """Text with the numbers of blocks and experts replaced by a star."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", text)


def by_shape(groups: Sequence[Group]) -> Mapping[str, tuple[int, int]]:
    """Shape of every pruned matrix, by the name of its linear."""
    return {
        member.removesuffix(".weight"): (group.shape[0], group.shape[1])
        for group in groups
        if group.status == "pruned"
        for member in group.members
    }

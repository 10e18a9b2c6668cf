"""Which weights are pruned, which stay dense and which stop a run, and why.

An entry of ``targets`` or ``ignore`` is a class name, an exact module name, or ``re:`` and
a regular expression that must match from the start of the module name. ``Linear`` stands
for every linear layer, those that transformers stores transposed (``Conv1D``) and
subclasses included.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from layerwise.adapters import Adapter
from layerwise.adapters.linear import is_linear, matrix
from layerwise.errors import InvalidProblemError, UsageError
from layerwise.patterns import Pattern

ANY_LINEAR = "Linear"
OUTSIDE = "outside the decoder blocks"
Status = Literal["pruned", "dense", "refused"]
Matches = Callable[[str, str, nn.Module], bool]


@dataclass(frozen=True)
class Verdict:
    """Status of a weight in a run, and why it is not pruned. A refused weight stops it."""

    status: Status
    reason: str = ""


class Judgement:
    """Decision about every weight of a model: pruned, left dense or refused.

    Parameters
    ----------
    model, adapter
        The model, on any device, and its declaration.
    targets, ignore
        Entries as described above.
    pattern
        Pattern that every pruned matrix must satisfy; None: any matrix is accepted.

    Attributes
    ----------
    candidates
        Linears of the blocks that can be pruned, by full name.
    unserved
        Weights of the blocks that the adapter cannot prune, by name: a linear, or the
        module that holds the parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        targets: Sequence[str],
        ignore: Sequence[str],
        pattern: Pattern | None,
    ) -> None:
        self._adapter, self._pattern = adapter, pattern
        self._targets, self._ignore = targets, ignore
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._names = names_of(model)
        self.candidates = {
            f"{block}.{name}": adapter.linear(module, name)
            for block, module in adapter.blocks_of(model).items()
            for name in adapter.linear_names(block)
        }
        self.unserved = {
            name: self._modules.get(name) or self._modules[name.rpartition(".")[0]]
            for name in adapter.unserved
        }

    def first_name(self, parameter: str) -> str:
        """First name in the model of the tensor of a parameter."""
        return self._names[parameter][0]

    def of_parameter(self, parameter: str) -> Verdict:
        """Verdict on any parameter, by its full name."""
        owner, _, own = parameter.rpartition(".")
        if owner in self.candidates and own == "weight":
            return self.of_linear(owner)
        if (first := self.first_name(parameter)) != parameter:
            return Verdict("dense", f"shared with {first}")
        if not parameter.startswith(f"{self._adapter.blocks}."):
            return Verdict("dense", OUTSIDE)
        if self._parameters[parameter].dim() < 2:
            return Verdict("dense", "a vector")
        for name in (owner, parameter):
            if name in self.unserved:
                return self.of_unserved(name)
        if own == "weight" and is_linear(self._modules[owner]):
            return Verdict("dense", f"not declared by the {self._adapter.name} adapter")
        return Verdict("dense", "not a linear layer")

    def of_linear(self, name: str) -> Verdict:
        """Verdict on a candidate."""
        linear, weight = self.candidates[name], f"{name}.weight"
        why = left_dense(name, linear, self._targets, self._ignore)
        if why is not None:
            return Verdict("dense", why)
        if (other := other_name(self._names[weight], weight)) is not None:
            return Verdict("refused", f"shared with {other}; ignore both")
        if self._pattern is None:
            return Verdict("pruned")
        rows, width = matrix(linear).shape
        try:
            self._pattern.check((rows, width))
        except InvalidProblemError as error:
            return Verdict("refused", str(error))
        return Verdict("pruned")

    def of_unserved(self, name: str) -> Verdict:
        """Verdict on a weight that the adapter cannot prune: refused unless left out."""
        reason, module = self._adapter.unserved[name], self.unserved[name]
        why = left_dense(name, module, self._targets, self._ignore, _matches_unserved)
        if why is None:
            return Verdict("refused", reason)
        return Verdict("dense", f"{reason}; {why}")


def matches(entry: str, name: str, module: nn.Module) -> bool:
    """Whether an entry matches a module."""
    if entry.startswith("re:"):
        try:
            return re.match(entry[3:], name) is not None
        except re.error as error:
            message = f"{entry!r} is not a regular expression: {error}; correct it"
            raise UsageError(message) from None
    any_linear = entry == ANY_LINEAR and is_linear(module)
    return entry in (name, type(module).__name__) or any_linear


def _matches_unserved(entry: str, name: str, module: nn.Module) -> bool:
    """Whether an entry matches a weight that cannot be pruned, or the module around it."""
    return matches(entry, name, module) or entry in (name.rpartition(".")[0], ANY_LINEAR)


def left_dense(
    name: str,
    module: nn.Module,
    targets: Sequence[str],
    ignore: Sequence[str],
    matching: Matches = matches,
) -> str | None:
    """Reason why the entries leave a module dense; None if they select it.

    Parameters
    ----------
    name, module
        The module and its name.
    targets, ignore
        Entries as described above.
    matching
        Whether an entry matches a module.
    """
    for entry in ignore:
        if matching(entry, name, module):
            return f"ignored by {entry!r}"
    if not any(matching(entry, name, module) for entry in targets):
        return "not in targets"
    return None


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """All names of the tensor of a parameter, by the name of the parameter."""
    names: dict[int, list[str]] = {}
    tensors: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensors[name] = id(parameter) if parameter.is_meta else parameter.data_ptr()
        names.setdefault(tensors[name], []).append(name)
    return {name: names[tensor] for name, tensor in tensors.items()}


def other_name(names: Sequence[str], weight: str) -> str | None:
    """First name of a tensor other than the given one, or None."""
    return next((name for name in names if name != weight), None)

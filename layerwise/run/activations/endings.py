"""Modules of a block whose result is that of the last linear in them, as of attention.

When that linear is written, nothing in front of it changes any more: the inputs that it
had while its moments were summed are those it keeps, and its output is the module's. So
later passes through the block need not compute the module again. Which modules end like
that is not declared but seen: they return the very tensor that the linear returned, and
nothing was written into it.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwise.adapters import Stage


@dataclass(frozen=True)
class Ending:
    """A module that returns what a linear in it returns.

    Parameters
    ----------
    module
        Its name, relative to the block.
    others
        How many times None follows in the tuple that it returns; None: no tuple.
    """

    module: str
    others: int | None

    def output(self, states: Tensor) -> Any:
        """What the module returns around an output of the linear."""
        return states if self.others is None else (states, *(None,) * self.others)


class Endings:
    """Looks for modules that end with the linear of a stage while a block is run.

    Parameters
    ----------
    block
        The block.
    stages
        What is pruned in it, in the order of the data flow.
    """

    def __init__(self, block: nn.Module, stages: Sequence[Stage]) -> None:
        self._block = block
        self._around = {
            stage.linears[0]: around
            for index, stage in enumerate(stages)
            if (around := modules_around(stages, index))
        }
        self._found: dict[tuple[str, str], Ending | None] = {}  # None: does not end so

    def attach(self) -> Iterator[RemovableHandle]:
        """Hooks that look, for the passes that follow."""
        for linear, around in self._around.items():
            given = _Given()
            module = self._block.get_submodule(linear)
            yield module.register_forward_hook(given.remember)
            for name in around:
                look = self._look(linear, name, given)
                yield self._block.get_submodule(name).register_forward_hook(look)

    def _look(self, linear: str, name: str, given: "_Given") -> Callable[..., None]:
        def look(_: nn.Module, args: Any, output: Any) -> None:
            seen = _ending(name, output, given)
            before = self._found.setdefault((linear, name), seen)
            if seen != before:
                self._found[linear, name] = None

        return look

    def found(self) -> Mapping[str, Ending]:
        """The outermost module that ends with a linear, by the name of the linear."""
        endings = {}
        for linear, around in self._around.items():
            seen = (self._found.get((linear, name)) for name in around)
            ending = next((one for one in seen if one is not None), None)
            if ending is not None:
                endings[linear] = ending
        return endings


def modules_around(stages: Sequence[Stage], index: int) -> list[str]:
    """Modules that may end with a stage, outermost first.

    A stage ends no module if it has several linears, if it is the last, because nothing is
    visited behind it, or if linears of later stages lie in the module.
    """
    stage = stages[index]
    if len(stage.linears) != 1 or stage.source is not None or index == len(stages) - 1:
        return []
    parts = stage.linears[0].split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts))]
    others = [name for later in stages[index + 1 :] for name in later.linears]
    return [n for n in names if not any(o.startswith(f"{n}.") for o in others)]


class _Given:
    """The last output of a linear, as it was when it was given."""

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._version = 0

    def remember(self, _: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the linear."""
        self._tensor = None if output.is_inference() else weakref.ref(output)
        self._version = 0 if output.is_inference() else output._version

    def is_(self, value: Any) -> bool:
        """Whether a value is that tensor, and nothing was written into it since."""
        tensor = None if self._tensor is None else self._tensor()
        return tensor is not None and tensor is value and tensor._version == self._version


def _ending(name: str, output: Any, given: _Given) -> Ending | None:
    if not isinstance(output, tuple):
        return Ending(name, None) if given.is_(output) else None
    if type(output) is not tuple or len(output) == 0 or not given.is_(output[0]):
        return None
    others = len(output) - 1
    return Ending(name, others) if output[1:] == (None,) * others else None

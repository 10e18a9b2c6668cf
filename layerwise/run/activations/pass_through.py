"""Pass-through modules: they return what their last linear returns, as attention does.

Once that linear is written, nothing before it changes any more: it keeps the inputs that it
had while its moments were summed, and its output is the output of the module. So later
passes through the block need not compute the module again. Pass-through modules are not
declared but detected: they return the very tensor that the linear returned, and nothing was
written into it.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from layerwise.adapters import Stage


@dataclass(frozen=True)
class PassThrough:
    """A module that returns the output of a linear inside it.

    Parameters
    ----------
    module
        Name of the module, relative to the block.
    others
        Number of None values after the output in the returned tuple; None: not a tuple.
    """

    module: str
    others: int | None

    def output(self, states: Tensor) -> Any:
        """Return value of the module for an output of the linear."""
        return states if self.others is None else (states, *(None,) * self.others)


class PassThroughFinder:
    """Finds the pass-through modules of the stages while a block is run.

    Parameters
    ----------
    block
        The block.
    stages
        Its pruned stages, in the order of the data flow.
    """

    def __init__(self, block: nn.Module, stages: Sequence[Stage]) -> None:
        self._block = block
        self._enclosing = {
            stage.linears[0]: enclosing
            for index, stage in enumerate(stages)
            if (enclosing := enclosing_modules(stages, index))
        }
        self._seen: dict[tuple[str, str], PassThrough | None] = {}  # None: does more

    def attach(self) -> Iterator[RemovableHandle]:
        """Attach the hooks that observe the following passes."""
        for linear, enclosing in self._enclosing.items():
            returned = _Returned()
            module = self._block.get_submodule(linear)
            yield module.register_forward_hook(returned.remember)
            for name in enclosing:
                observe = self._observer(linear, name, returned)
                yield self._block.get_submodule(name).register_forward_hook(observe)

    def _observer(
        self, linear: str, name: str, returned: "_Returned"
    ) -> Callable[..., None]:
        def observe(_: nn.Module, args: Any, output: Any) -> None:
            seen = _pass_through(name, output, returned)
            before = self._seen.setdefault((linear, name), seen)
            if seen != before:
                self._seen[linear, name] = None

        return observe

    def modules(self) -> Mapping[str, PassThrough]:
        """Outermost pass-through module of every linear, by the name of the linear."""
        modules = {}
        for linear, enclosing in self._enclosing.items():
            seen = (self._seen.get((linear, name)) for name in enclosing)
            outermost = next((module for module in seen if module is not None), None)
            if outermost is not None:
                modules[linear] = outermost
        return modules


def enclosing_modules(stages: Sequence[Stage], index: int) -> list[str]:
    """Modules around a stage that may be pass-through modules, outermost first.

    A stage has none if it has several linears, or if it is the last one: nothing is visited
    after it. A module that contains linears of later stages is not one of them.
    """
    stage = stages[index]
    if len(stage.linears) != 1 or stage.source is not None or index == len(stages) - 1:
        return []
    parts = stage.linears[0].split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts))]
    others = [name for later in stages[index + 1 :] for name in later.linears]
    return [n for n in names if not any(o.startswith(f"{n}.") for o in others)]


class _Returned:
    """The last output of a linear, at the version at which it was returned."""

    def __init__(self) -> None:
        self._tensor: weakref.ref[Tensor] | None = None
        self._version = 0

    def remember(self, _: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook of the linear."""
        self._tensor = None if output.is_inference() else weakref.ref(output)
        self._version = 0 if output.is_inference() else output._version

    def is_(self, value: Any) -> bool:
        """Whether a value is that tensor, with nothing written into it since then."""
        tensor = None if self._tensor is None else self._tensor()
        return tensor is not None and tensor is value and tensor._version == self._version


def _pass_through(name: str, output: Any, returned: _Returned) -> PassThrough | None:
    if not isinstance(output, tuple):
        return PassThrough(name, None) if returned.is_(output) else None
    if type(output) is not tuple or len(output) == 0 or not returned.is_(output[0]):
        return None
    others = len(output) - 1
    return PassThrough(name, others) if output[1:] == (None,) * others else None

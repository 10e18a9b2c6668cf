"""Parameter sets to train, and their installation in a model.

===========  =========================================================================
name         parameters
===========  =========================================================================
biases       every bias
norms        scales and shifts of all normalisations
head         a low-rank change of the LM head, and of the embedding tied to it
lora-prune   low-rank changes of the pruned weights: :mod:`layerwise.recovery.low_rank`
scale-lora   the same
masklora     the same
full         all parameters, with the masks applied: the reference, with the most memory
===========  =========================================================================

Names are joined by ``+``. Masks are arguments, never derived from the zeros: a kept weight
that happens to be zero may train, a removed weight may not.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from layerwise.errors import UsageError
from layerwise.limits import check_limit
from layerwise.recovery.low_rank import KINDS, LowRank, Masked

WEIGHTS = (*(kind for kind in KINDS if kind != "lora"), "full")
HALF = (torch.float16, torch.bfloat16)
SETS = ("biases", "norms", "head", *WEIGHTS)


@dataclass(frozen=True)
class ParameterSets:
    """Parameter sets of a run.

    Parameters
    ----------
    names
        Names from the table above; at most one set that changes the pruned weights.
    rank, scale
        Rank and scale of low-rank changes.
    """

    names: tuple[str, ...]
    rank: int = 16
    scale: float = 2.0

    def __post_init__(self) -> None:
        for name in self.names:
            if name not in SETS:
                message = f"parameters must be joined from {', '.join(SETS)}; got {name!r}"
                raise UsageError(message)
        if len(set(self.names)) < len(self.names) or len(self.on_weights) > 1:
            message = (
                f"parameters {self}: a set is named twice, or two sets change the same "
                f"weights; join at most one of {', '.join(WEIGHTS)} with the others"
            )
            raise UsageError(message)
        check_limit("rank", self.rank)
        if self.rank < 1 or not 0 < self.scale < math.inf:
            message = (
                f"rank must be at least 1 and scale above 0, and finite, got {self.rank} "
                f"and {self.scale}"
            )
            raise UsageError(message)

    def __str__(self) -> str:
        return "+".join(self.names)

    @property
    def on_weights(self) -> tuple[str, ...]:
        """Sets that change the pruned weights."""
        return tuple(name for name in self.names if name in WEIGHTS)


class Trainable:
    """The trained parameters of a module; all others are frozen.

    Parameters
    ----------
    root
        A model or a block, in float32.
    sets
        Parameter sets to train.
    masks
        Kept entries of the pruned weights, by parameter name inside `root`; these are
        the weights that low-rank sets change.
    scope
        Names of the submodules whose biases, norms and weights take part; ``("",)`` for
        all of `root`.
    seed
        Seed of the random factors.

    Raises
    ------
    UsageError
        If there is nothing to train.
    """

    def __init__(
        self,
        root: nn.Module,
        sets: ParameterSets,
        masks: Mapping[str, Tensor],
        *,
        scope: tuple[str, ...] = ("",),
        seed: int = 0,
    ) -> None:
        self._root = root
        self._learned = [(p, p.requires_grad) for p in root.parameters()]
        own = {n: p for n, p in root.named_parameters() if _inside(n, scope)}
        self._plain = {n: p for n, p in own.items() if _is_plain(root, n, sets.names)}
        for parameter, _ in self._learned:
            parameter.requires_grad_(False)
        self._changes: dict[str, LowRank | Masked] = {}
        generator = torch.Generator().manual_seed(seed)
        inside = {name: mask for name, mask in masks.items() if name in own}
        for kind in sets.on_weights:
            for name, mask in inside.items():
                weight = own[name]
                mask = mask.to(weight.device)
                if kind == "full":
                    self._plain.pop(name, None)
                    self._attach(name, Masked(mask))
                    weight.requires_grad_(True)
                else:
                    change = LowRank(
                        kind,  # type: ignore[arg-type]
                        weight,
                        mask,
                        sets.rank,
                        sets.scale,
                        generator,
                    )
                    self._attach(name, change)
        if "head" in sets.names:
            self._attach_head(sets, generator)
        for parameter in self._plain.values():
            parameter.requires_grad_(True)
        self.parameters = [p for p in root.parameters() if p.requires_grad]
        if not self.parameters:
            self.release()
            message = (
                f"there is nothing to train: {sets} matches no parameter; choose other sets"
            )
            raise UsageError(message)
        self._start = [p.detach().clone() for p in self.parameters]

    @property
    def n_parameters(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def values(self) -> list[Tensor]:
        """Copies of the trained values."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def set_values(self, values: list[Tensor] | None = None) -> None:
        """Set the trained values, by default to the initial ones."""
        given = self._start if values is None else values
        for parameter, value in zip(self.parameters, given, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def merge(self) -> dict[str, Tensor]:
        """Merge the changes into the module; return new values by parameter name."""
        changed = {}
        for name, change in self._changes.items():
            path, _, own = name.rpartition(".")
            original = self._root.get_submodule(path).parametrizations[own].original  # type: ignore[union-attr,index]
            changed[name] = change.merged(original)
        plain = {name: p.detach() for name, p in self._plain.items()}
        self.release()
        for name, value in changed.items():
            self._root.get_parameter(name).copy_(value)
        return {
            name: self._root.get_parameter(name).detach() for name in [*changed, *plain]
        }

    def release(self) -> None:
        """Remove the parametrizations with their changes, and unfreeze the module."""
        for module in list(self._root.modules()):
            if parametrize.is_parametrized(module):
                for own in list(module.parametrizations):  # type: ignore[arg-type]
                    _detach(module, own)
        for parameter, learned in self._learned:
            parameter.requires_grad_(learned)
            parameter.grad = None

    def _attach(self, name: str, change: LowRank | Masked) -> None:
        path, _, own = name.rpartition(".")
        parametrize.register_parametrization(self._root.get_submodule(path), own, change)
        self._changes[name] = change

    def _attach_head(self, sets: ParameterSets, generator: torch.Generator) -> None:
        """Attach one change to the LM head and, if the weight is tied, the embedding."""
        model: Any = self._root
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if head is None:
            message = "the set head trains the LM head: choose the objective tokens"
            raise UsageError(message)
        weight = head.weight
        self._plain = {n: p for n, p in self._plain.items() if p is not weight}
        change = LowRank("lora", weight, None, sets.rank, sets.scale, generator)
        name = next(n for n, p in model.named_parameters() if p is weight)
        owners = [
            (module, own)
            for module in model.modules()
            for own, parameter in list(module._parameters.items())
            if parameter is weight
        ]
        for module, own in owners:
            parametrize.register_parametrization(module, own, change)
        self._changes[name] = change


def _detach(module: Any, own: str) -> None:
    """Remove a parametrization and restore the original weight."""
    original = module.parametrizations[own].original
    parametrize.remove_parametrizations(module, own, leave_parametrized=False)
    module._parameters[own] = original  # the same object, because weights may be tied


def _inside(name: str, scope: tuple[str, ...]) -> bool:
    return any(not module or name.startswith(module + ".") for module in scope)


def _is_plain(root: nn.Module, name: str, sets: tuple[str, ...]) -> bool:
    """Whether a parameter is trained directly, without a low-rank change."""
    if "full" in sets or ("biases" in sets and name.rpartition(".")[2] == "bias"):
        return True
    module = root.get_submodule(name.rpartition(".")[0])
    return "norms" in sets and is_norm(module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with a scale, judged by its class name."""
    weight = getattr(module, "weight", None)
    named = "norm" in type(module).__name__.lower()
    return named and isinstance(weight, Tensor) and weight.dim() == 1


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Convert half-precision parameters and buffers to float32, and back at the end."""
    types: dict[nn.Parameter, torch.dtype] = {}
    for parameter in module.parameters():
        if parameter.dtype in HALF:
            types[parameter] = parameter.dtype
            parameter.data = parameter.data.float()
    buffers = [
        (owner, name, buffer.dtype)
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and buffer.dtype in HALF
    ]
    for owner, name, _ in buffers:
        owner._buffers[name] = owner._buffers[name].float()  # type: ignore[union-attr]
    try:
        yield
    finally:
        for parameter, dtype in types.items():
            parameter.data = parameter.data.to(dtype)
        for owner, name, dtype in buffers:
            owner._buffers[name] = owner._buffers[name].to(dtype)  # type: ignore[union-attr]

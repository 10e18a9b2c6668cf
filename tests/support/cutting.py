"""Random cuts of models, and the masked models that they must be equal to."""

import copy
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from layerwise.adapters import ADAPTERS, Adapter, get_adapter, get_coupling
from layerwise.demo import MODELS, model_path
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model
from layerwise.run.models.surgery import Cut, steps_of
from tests.support.models import random_tokens, tiny_model

COUPLED = [family for family in ADAPTERS if get_adapter(family).couplings]
EACH = [(f, c.name) for f in COUPLED for c in get_adapter(f).couplings]
STOCK = [(f, c.name) for f in COUPLED for c in get_adapter(f).couplings if c.stock]
PACKAGED = [f"demo-{name}" for name in MODELS]


def names_of(family: str) -> list[str]:
    """Couplings of a family, also of one of the packaged models."""
    return [c.name for c in get_adapter(family.removeprefix("demo-")).couplings]


def model_of(family: str, **more: Any) -> tuple[Any, Adapter]:
    """A random tiny model or, as ``demo-llama``, a packaged one; and its adapter."""
    if family.startswith("demo-"):
        name = family.removeprefix("demo-")
        return copy.deepcopy(_packaged(name)), get_adapter(name)
    return tiny_model(family, layers=3, **more), get_adapter(family)


@cache
def _packaged(name: str) -> Any:
    return load_model(Checkpoint.open(model_path(name))).float()


def random_cuts(
    model: Any, adapter: Adapter, names: Sequence[str], *, uniform: bool = False
) -> list[Cut]:
    """Kept sets that differ in every block; their sizes as well, unless uniform."""
    generator = torch.Generator().manual_seed(1)
    cuts = []
    for index, (name, block) in enumerate(adapter.blocks_of(model).items()):
        for coupling in names:
            channels = get_coupling(adapter, coupling).resolve(block, name)
            heads = torch.zeros(channels.units, dtype=torch.long)
            if channels.balance is not None:
                heads = channels.balance
            size = int((heads == 0).sum())
            keep = max(size // 2 if uniform or index else size - 1, 1)
            order = torch.rand(channels.units, generator=generator)
            mask = channels.pattern(keep).mask(order[channels.groups].unsqueeze(0))[0]
            kept = torch.tensor(sorted(set(channels.groups[mask].tolist())))
            assert len(kept) == keep * (int(heads.max()) + 1)
            cuts.append(Cut(name, coupling, kept))
    return cuts


@torch.no_grad()
def masked(model: Any, adapter: Adapter, cuts: Sequence[Cut]) -> Any:
    """Copy of a model in which nothing reads the removed channels."""
    result = copy.deepcopy(model)
    for cut in cuts:
        coupling = get_coupling(adapter, cut.coupling)
        block = result.get_submodule(cut.block)
        stays = coupling.resolve(block).stays(cut.kept)
        for linear in coupling.consumers:
            axis, mask = stays[f"{linear}.weight"]
            assert axis == 1
            block.get_parameter(f"{linear}.weight")[:, ~mask] = 0
    return result


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    """Logits on a few tokens."""
    logits: Tensor = model(random_tokens(2, 9), use_cache=False).logits
    return logits


def exact_logits_of(model: Any) -> Tensor:
    """The same in float64: those of packaged models are large, and round by processor."""
    return logits_of(copy.deepcopy(model).double())


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference."""
    return float((one.double() - other.double()).abs().max())


def size_of(model: Any) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def evenly(adapter: Adapter, model: Any, name: str, keep: int) -> list[Cut]:
    return [Cut(block, name, torch.arange(keep)) for block in adapter.blocks_of(model)]


def state_of(model: Any) -> dict[str, Any]:
    """Everything that a refused call must leave alone."""
    tensors = {name: (id(p), p._version) for name, p in model.named_parameters()}
    return {**tensors, "config": model.config.to_dict(), "record": list(steps_of(model))}

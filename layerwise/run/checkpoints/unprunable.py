"""Weights that must not be pruned in silence, or left dense in silence.

Both are refused with names, and with what to ignore to go on without them.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from layerwise.adapters import Adapter
from layerwise.errors import UnsupportedModelError
from layerwise.run.entries import ANY_LINEAR, matches


def refuse_unserved(
    model: nn.Module,
    adapter: Adapter,
    unserved: Mapping[str, nn.Module],
    targets: Sequence[str],
    ignore: Sequence[str],
) -> None:
    """Raise if weights that the adapter cannot serve are wanted and not ignored."""

    def named(entries: Sequence[str], name: str) -> bool:
        module, parent = unserved[name], name.rpartition(".")[0]
        return any(
            matches(entry, name, module) or entry in (parent, ANY_LINEAR)
            for entry in entries
        )

    wanted = [n for n in unserved if named(targets, n) and not named(ignore, n)]
    if not wanted:
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sizes = [parameters.get(n, parameters.get(f"{n}.weight")) for n in wanted]
    prefix = f"{adapter.blocks}."
    total = sum(p.numel() for n, p in parameters.items() if n.startswith(prefix))
    share = sum(p.numel() for p in sizes if p is not None) / total
    kinds: dict[str, str] = {}  # expression for all blocks -> first name
    for name in wanted:
        kinds.setdefault("re:" + r"\.\d+".join(re.split(r"\\\.\d+", re.escape(name))), name)
    shown = [f"{name} ({adapter.unserved[name]})" for name in kinds.values()]
    message = (
        f"{len(wanted)} weights of the blocks, {share:.1%} of their parameters, cannot be "
        f"pruned, such as {', '.join(shown[:3])}; to leave them dense, ignore "
        f"{' '.join(kinds)}"
    )
    raise UnsupportedModelError(message)


def refuse_shared(model: nn.Module, names: Sequence[str]) -> None:
    """Raise if a weight to prune is also the weight of another place in the model."""
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(_place(parameter), []).append(name)
    for name in names:
        weight = f"{name}.weight"
        shared = users[_place(model.get_parameter(weight))]
        if len(shared) > 1:
            other = next(user for user in shared if user != weight)
            message = (
                f"{weight} and {other} are one tensor: pruning it for one place would "
                f"change the other; ignore both"
            )
            raise UnsupportedModelError(message)


def _place(parameter: nn.Parameter) -> int:
    """What two names of one tensor have in common."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr()

"""The directions of Adapprox: gradients over the roots of second moments, in batches.

Parameters with a dense second moment are updated by foreach operations. Matrices with
factors are stacked by shape and rank, so that a network of many layers needs few calls.
"""

import math
import zlib

# PyTorch uses its _foreach functions in its own optimizers, but does not export them
# pyright: reportPrivateImportUsage=false
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layerwise.solvers.optimizer.second_moment import RankRule, select, update

CHUNK = 1 << 20  # weights that are updated as one batch: larger batches exceed the cache


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter that has a gradient."""

    index: int  # in all groups, one after the other
    parameter: Tensor
    gradient: Tensor
    state: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Shorter and longer side of the matrix that the parameter is flattened to."""
        rows = self.parameter.shape[0] if self.parameter.ndim else 1
        lengths = rows, self.parameter.numel() // rows
        return min(lengths), max(lengths)

    @property
    def is_tall(self) -> bool:
        """Whether the rows are the longer side."""
        return self.parameter.shape[0] > self.shape[0]

    def matrix(self) -> Tensor:
        """Gradient as a matrix whose shorter side comes first."""
        flat = self.precise_gradient().reshape(self.parameter.shape[0], -1)
        return flat.mT if self.is_tall else flat

    def unflatten(self, matrix: Tensor) -> Tensor:
        """Reshape a matrix from the form of :meth:`matrix` to the parameter's shape."""
        return (matrix.mT if self.is_tall else matrix).reshape(self.parameter.shape)

    def precise_gradient(self) -> Tensor:
        """Gradient in the precision of the state."""
        return self.gradient.to(precision(self.parameter))


def precision(parameter: Tensor) -> torch.dtype:
    """Precision of states and of all arithmetic."""
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def prepare(entry: Entry, group: Mapping[str, Any]) -> None:
    """Count the step, and create missing state of a parameter."""
    state, parameter = entry.state, entry.parameter
    if "step" not in state:
        state["step"] = 0
        if parameter.ndim < 2 or _largest_rank(entry, group) < 1:
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=precision(parameter))
    if group["betas"][0] > 0 and "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(parameter, dtype=precision(parameter))
    state["step"] += 1


def _largest_rank(entry: Entry, group: Mapping[str, Any]) -> int:
    return math.floor(entry.shape[0] * float(group["max_rank"]))


def batches(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """Entries that can be updated together, in batches of bounded size.

    Factored matrices of a batch have equal shape, rank and step, to form one stack.
    """
    alike: dict[Any, list[Entry]] = {}
    for entry in entries:
        state, parameter = entry.state, entry.parameter
        key = [parameter.device, precision(parameter), "exp_avg_sq" in state]
        if "exp_avg_sq" not in state:
            rank = state["left"].shape[-1] if "left" in state else 0
            key += [entry.shape, rank, state["step"]]
        alike.setdefault(tuple(key), []).append(entry)
    for batch in alike.values():
        size = max(1, CHUNK // max(entry.parameter.numel() for entry in batch))
        for begin in range(0, len(batch), size):
            yield batch[begin : begin + size]


def directions(group: Mapping[str, Any], batch: Sequence[Entry]) -> list[Tensor]:
    """Clipped N of a batch; also updates the second moments."""
    if "exp_avg_sq" in batch[0].state:
        return _dense_directions(group, batch)
    return _factored_directions(group, batch)


def _dense_directions(group: Mapping[str, Any], batch: Sequence[Entry]) -> list[Tensor]:
    """N of parameters with a dense V."""
    beta2 = group["betas"][1]
    gradients = [entry.precise_gradient() for entry in batch]
    moments = [entry.state["exp_avg_sq"] for entry in batch]
    torch._foreach_mul_(moments, beta2)
    torch._foreach_addcmul_(moments, gradients, gradients, value=1 - beta2)
    roots = torch._foreach_sqrt(moments)
    torch._foreach_add_(roots, group["eps"])
    directions = list(torch._foreach_div(gradients, roots))
    norms = torch._foreach_norm(directions)
    for direction, norm in zip(directions, norms, strict=True):
        rms = norm / direction.numel() ** 0.5
        direction.div_((rms / group["clip"]).clamp_min_(1))
    return directions


def _factored_directions(group: Mapping[str, Any], batch: Sequence[Entry]) -> list[Tensor]:
    """N of matrices in one stack; also updates the factors of V in their states."""
    beta2 = group["betas"][1]
    states = [entry.state for entry in batch]
    G = torch.stack([entry.matrix() for entry in batch])
    Q = None
    if "left" in states[0]:
        Q = torch.stack([state["left"] for state in states])
        U = torch.stack([state["right"] for state in states])
        V = (Q @ (beta2 * U).mT).clamp_(min=0).addcmul_(G, G, value=1 - beta2)
    else:
        V = G.square().mul_(1 - beta2)
    _store_factors(group, batch, V, Q)
    N = torch.div(G, V.sqrt_().add_(group["eps"]), out=V)
    rms = torch.linalg.vector_norm(N, dim=(-2, -1), keepdim=True) / N[0].numel() ** 0.5
    N.div_((rms / group["clip"]).clamp_min_(1))
    return [entry.unflatten(n) for entry, n in zip(batch, N, strict=True)]


def _store_factors(
    group: Mapping[str, Any],
    batch: Sequence[Entry],
    V: Tensor,  # (batch, short, long)
    Q: Tensor | None,  # (batch, short, rank)
) -> None:
    """Factor V and store the factors; every `select_every` steps, select the rank anew."""
    largest, step = _largest_rank(batch[0], group), batch[0].state["step"]
    rule = RankRule(
        smallest=min(group["initial_rank"], largest),
        largest=largest,
        threshold=group["error_threshold"],
        oversampling=group["oversampling"],
        iterations=group["iterations"],
        warm_start=group["warm_start"],
    )

    def draw(member: int, present: int, width: int) -> Tensor:
        words = (group["seed"], batch[member].index, step, present, width)
        seed = zlib.crc32(" ".join(map(str, words)).encode())
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(V.shape[-1], width - present, generator=generator)

    if Q is None or (step - 1) % group["select_every"] == 0:
        factors = select(V, Q, rule, draw)
        for entry, (left, right) in zip(batch, factors, strict=True):
            entry.state["left"], entry.state["right"] = left, right
        return
    left, right = update(V, Q, rule, draw)
    torch._foreach_copy_([entry.state["left"] for entry in batch], list(left))
    torch._foreach_copy_([entry.state["right"] for entry in batch], list(right))

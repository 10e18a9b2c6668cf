"""Sparsity patterns: which sets of weights may be kept.

A pattern answers three questions: is it possible for a matrix of this shape
(:meth:`Pattern.check`), which feasible mask keeps the largest scores
(:meth:`Pattern.mask`), and is a given mask feasible (:meth:`Pattern.accepts`). Masks are
boolean and ``True`` means **kept**, everywhere. Counts are exact, and among equal scores
the entry with the smaller index is removed first.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from layerwise.arrays import INTEGERS, check_integer, check_real, tensor_of
from layerwise.chunks import SLAB, slabs
from layerwise.errors import InvalidProblemError, quoted
from layerwise.limits import LARGEST_GROUP

ENTRIES_AT_ONCE = 1 << 26  # of the scores on a GPU
LONG_ROW = 1 << 20  # sorted on a GPU, as faster: github.com/pytorch/pytorch/issues/75599
SMALL_GROUP = 8  # up to this size all pairs are compared, which is faster than sorting


class Pattern(ABC):
    """A set of feasible masks for a weight of shape (out, in)."""

    @abstractmethod
    def check(self, shape: tuple[int, int]) -> None:
        """Raise :class:`InvalidProblemError` if no mask of this shape is feasible."""

    @abstractmethod
    def mask(self, scores: Tensor) -> Tensor:
        """Feasible mask that keeps the largest scores; both of shape (out, in)."""

    @abstractmethod
    def accepts(self, mask: Tensor) -> bool:
        """Whether `mask` has exactly the zeros that the pattern requires."""

    @abstractmethod
    def __str__(self) -> str:
        """Form used on the command line and in reports."""


@dataclass(frozen=True)
class Unstructured(Pattern):
    """A fraction of zeros anywhere.

    Parameters
    ----------
    sparsity
        Fraction of zeros in [0, 1); ``floor(sparsity * size)`` of every group are removed.
    group
        ``"row"``: every output row loses the same number; ``"layer"``: one budget for the
        whole matrix.
    """

    sparsity: float
    group: Literal["row", "layer"] = "row"

    def __post_init__(self) -> None:
        check_real(self.sparsity, "sparsity")
        if not 0 <= self.sparsity < 1:
            message = f"sparsity must lie in [0, 1), got {self.sparsity}"
            raise InvalidProblemError(message)
        if self.group not in ("row", "layer"):
            message = f"group must be 'row' or 'layer', got {self.group!r}"
            raise InvalidProblemError(message)

    def removed(self, size: int) -> int:
        """Exact ``floor(sparsity * size)``, free of binary rounding (0.29 of 100: 29)."""
        return int(Fraction(repr(float(self.sparsity))) * size)

    def check(self, shape: tuple[int, int]) -> None:
        """Accept every shape."""

    def mask(self, scores: Tensor) -> Tensor:
        """Remove the smallest scores of every row, or of the whole matrix."""
        groups = scores if self.group == "row" else scores.reshape(1, -1)
        return keep_largest(groups, self.removed(groups.shape[1])).view_as(scores)

    def accepts(self, mask: Tensor) -> bool:
        """Whether every group has its exact count of removed entries."""
        groups = mask if self.group == "row" else mask.reshape(1, -1)
        counts = (~groups).sum(dim=1)
        return bool((counts == self.removed(groups.shape[1])).all())

    def __str__(self) -> str:
        return f"{self.sparsity:g}" + (" per layer" if self.group == "layer" else "")


@dataclass(frozen=True)
class NM(Pattern):
    """Semi-structured sparsity: **n kept** of every m consecutive weights of a row.

    ``NM(2, 4)`` is the pattern of sparse tensor cores. The width must be divisible by m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for name in ("n", "m"):
            check_integer(getattr(self, name), f"{name} of n:m")
            object.__setattr__(self, name, int(getattr(self, name)))
        if not 0 < self.n <= self.m:
            message = (
                f"n:m keeps n of every m weights, which needs 0 < n <= m; got "
                f"{self.n}:{self.m}"
            )
            raise InvalidProblemError(message)
        if self.m > LARGEST_GROUP:
            message = f"m of n:m is at most {LARGEST_GROUP}, got {quoted(self.m)}"
            raise InvalidProblemError(message)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros, 1 - n / m."""
        return 1 - self.n / self.m

    def check(self, shape: tuple[int, int]) -> None:
        """Raise if the width is not divisible by m."""
        if shape[1] % self.m:
            message = (
                f"pattern {self.n}:{self.m} needs a width divisible by {self.m}, but the "
                f"weight has {shape[1]} columns; ignore this layer or choose another m"
            )
            raise InvalidProblemError(message)

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the n largest scores of every group of m."""
        self.check((scores.shape[0], scores.shape[1]))
        return keep_largest(scores.reshape(-1, self.m), self.m - self.n).view_as(scores)

    def accepts(self, mask: Tensor) -> bool:
        """Whether every group keeps exactly n."""
        return bool((mask.reshape(-1, self.m).sum(dim=1) == self.n).all())

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True, eq=False)
class FixedMask(Pattern):
    """One given mask of shape (out, in), True = kept: only the weights are free."""

    kept: Tensor

    def __post_init__(self) -> None:
        kept = tensor_of(self.kept, "a fixed mask", (torch.bool,), "bool")
        object.__setattr__(self, "kept", kept)
        if self.kept.dim() != 2:
            message = (
                f"a fixed mask is a boolean matrix, got {self.kept.dtype} of shape "
                f"{tuple(self.kept.shape)}"
            )
            raise InvalidProblemError(message)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return 1 - float(self.kept.float().mean())

    def check(self, shape: tuple[int, int]) -> None:
        """Raise if the mask has another shape than the weight."""
        if tuple(self.kept.shape) != tuple(shape):
            message = f"mask {tuple(self.kept.shape)} does not fit weight {tuple(shape)}"
            raise InvalidProblemError(message)

    def mask(self, scores: Tensor) -> Tensor:
        """Return the given mask, whatever the scores."""
        return self.kept.to(scores.device)

    def accepts(self, mask: Tensor) -> bool:
        """Whether `mask` is the given one."""
        return bool(torch.equal(mask, self.kept.to(mask.device)))

    def __str__(self) -> str:
        return f"fixed mask ({self.sparsity:.3g})"


@dataclass(frozen=True, eq=False)
class Columns(Pattern):
    """Whole input columns, removed in units, for smaller matrices.

    Parameters
    ----------
    keep
        Number of units kept; per member of `balance` if that is given.
    groups
        Unit of each column, shape (in,), consecutive integers from 0; by default every
        column is a unit of its own.
    balance
        Head of each unit, shape (units,), consecutive integers from 0; every head then
        keeps the same number of units.
    """

    keep: int
    groups: Tensor | None = None
    balance: Tensor | None = None

    def __post_init__(self) -> None:
        check_integer(self.keep, "keep")
        object.__setattr__(self, "keep", int(self.keep))
        for name in ("groups", "balance"):
            labels = getattr(self, name)
            if labels is not None:
                labels = tensor_of(labels, name, INTEGERS, "integers").long()
                object.__setattr__(self, name, labels)

    def units(self, width: int, device: torch.device) -> Tensor:
        """Unit of each column, shape (in,)."""
        if self.groups is None:
            return torch.arange(width, device=device)
        return self.groups.to(device)

    def heads(self, units: int, device: torch.device) -> Tensor:
        """Head of each unit, shape (units,); all zero without balance."""
        if self.balance is None:
            return torch.zeros(units, dtype=torch.long, device=device)
        return self.balance.to(device)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise if the groups do not cover the width, or if too few units exist."""
        units = self.units(shape[1], torch.device("cpu"))
        if units.shape != (shape[1],):
            message = f"groups has shape {tuple(units.shape)}, expected ({shape[1]},)"
            raise InvalidProblemError(message)
        count = _count_labels(units, "groups")
        heads = self.heads(count, torch.device("cpu"))
        if heads.shape != (count,):
            message = f"balance has shape {tuple(heads.shape)}, expected ({count},)"
            raise InvalidProblemError(message)
        _count_labels(heads, "balance")
        smallest = int(torch.bincount(heads).min())
        if not 0 < self.keep <= smallest:
            message = f"keep must be between 1 and {smallest} units, got {self.keep}"
            raise InvalidProblemError(message)

    def mask(self, scores: Tensor) -> Tensor:
        """Keep the units with the largest summed scores, the same columns in all rows."""
        units = self.units(scores.shape[1], scores.device)
        total = scores.new_zeros(int(units.max()) + 1)
        total.index_add_(0, units, scores.sum(dim=0))
        return self.keep_units(total)[units].expand_as(scores).clone()

    def keep_units(self, scores: Tensor) -> Tensor:
        """Keep the units with the largest scores, in every head; both of shape (units,)."""
        heads = self.heads(len(scores), scores.device)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        for head in range(int(heads.max()) + 1):
            members = (heads == head).nonzero()[:, 0]
            row = scores[members].unsqueeze(0)
            kept[members] = keep_largest(row, row.shape[1] - self.keep)[0]
        return kept

    def accepts(self, mask: Tensor) -> bool:
        """Whether all rows agree, units are whole, and every head keeps `keep` units."""
        if not bool((mask == mask[0]).all()):
            return False
        units = self.units(mask.shape[1], mask.device)
        whole = torch.bincount(units)
        kept = torch.bincount(units[mask[0]], minlength=len(whole))
        heads = self.heads(len(whole), mask.device)
        counts = torch.bincount(heads[kept == whole], minlength=int(heads.max()) + 1)
        return bool(((kept == 0) | (kept == whole)).all() and (counts == self.keep).all())

    def __str__(self) -> str:
        return f"{self.keep} columns"


def _count_labels(labels: Tensor, name: str) -> int:
    """Count distinct labels, which must be consecutive integers from 0."""
    distinct = torch.unique(labels)
    expected = torch.arange(len(distinct), dtype=distinct.dtype, device=distinct.device)
    if not torch.equal(distinct, expected):
        shown = distinct.tolist()[:8]
        message = f"{name} must be consecutive integers from 0, got {shown}"
        raise InvalidProblemError(message)
    return len(distinct)


def keep_largest(
    scores: Tensor,  # (groups, size)
    removed: int,
) -> Tensor:  # (groups, size) bool
    """Mask without the `removed` smallest scores of each row; ties go by index."""
    if bool(torch.isnan(scores.sum())) and bool(torch.isnan(scores).any()):
        message = "scores contain NaN; a mask cannot be chosen from them"
        raise InvalidProblemError(message)
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.shape[1] <= SMALL_GROUP:
        return _ranks(scores) >= removed
    at_once = SLAB
    if scores.device.type != "cpu":  # as few calls as the memory allows
        at_once = max(SLAB, ENTRIES_AT_ONCE // scores.shape[1])
    parts = [_keep_largest(scores[rows], removed) for rows in slabs(len(scores), at_once)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _keep_largest(scores: Tensor, removed: int) -> Tensor:
    threshold = _kth_smallest(scores, removed)
    larger = scores > threshold
    surplus = removed - (~larger).sum(dim=1, keepdim=True)
    if not bool(surplus.any()):
        return larger
    tied = scores == threshold
    extra = tied.sum(dim=1, keepdim=True) + surplus  # of the tied entries, removed first
    return larger | (tied & (tied.cumsum(dim=1) > extra))


def _ranks(scores: Tensor) -> Tensor:
    """Rank of each entry in its row, in the order in which entries are removed."""
    columns = [scores[:, index].contiguous() for index in range(scores.shape[1])]
    ranks = [torch.zeros_like(column, dtype=torch.uint8) for column in columns]
    for later, entry in enumerate(columns):
        for earlier in range(later):
            first = columns[earlier] <= entry
            ranks[later] += first
            ranks[earlier] += ~first
    return torch.stack(ranks, dim=1)


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest of every row, shape (groups, 1)."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # three times as fast as kthvalue
        smallest = np.partition(scores.detach().numpy(), k - 1, axis=1)[:, k - 1 : k]
        return torch.from_numpy(smallest)
    if scores.device.type == "cuda" and scores.shape[1] >= LONG_ROW:
        return scores.sort(dim=1).values[:, k - 1 : k]
    return scores.kthvalue(k, dim=1, keepdim=True).values


def parse_pattern(text: str, group: Literal["row", "layer"] = "row") -> Pattern:
    """Pattern from its command-line form: ``"0.5"`` or ``"2:4"`` (keeps 2 of every 4)."""
    kept, colon, size = text.partition(":")
    try:
        return NM(int(kept), int(size)) if colon else Unstructured(float(text), group)
    except ValueError as error:
        if isinstance(error, InvalidProblemError):
            raise
        message = f"sparsity is a fraction (0.5) or n:m (2:4), got {quoted(text)}"
        raise InvalidProblemError(message) from None


PatternLike = Pattern | float | str
"""A pattern, a fraction of zeros, or the form of the command line."""


def as_pattern(value: Any) -> Pattern:
    """Pattern from a pattern, a fraction of zeros, or the form of the command line.

    Raises
    ------
    InvalidProblemError
        If it is anything else.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return parse_pattern(value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return Unstructured(float(value))
    message = (
        f'pattern must be a Pattern, a fraction of zeros (0.5) or n:m ("2:4"), got '
        f"{'None' if value is None else type(value).__name__}"
    )
    raise InvalidProblemError(message)

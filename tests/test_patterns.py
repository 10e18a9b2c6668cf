"""Patterns: exact counts, ties by index, impossible requests refused by name."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from layerwise.errors import InvalidProblemError
from layerwise.patterns import (
    NM,
    Columns,
    FixedMask,
    Pattern,
    Unstructured,
    keep_largest,
    parse_pattern,
)


def scores(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator)


@pytest.mark.parametrize(
    ("sparsity", "size", "removed"),
    [
        (0.5, 7, 3),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996 in binary
        (0.57, 100, 57),
        (0.1, 10, 1),
        (0.7, 10, 7),  # 0.7 * 10 rounds up in binary, 1 - 0.7 does not
        (0.0, 10, 0),
        (0.9999, 10, 9),
        (1 / 3, 3, 0),  # the nearest double lies below one third
    ],
)
def test_number_removed_is_the_exact_floor(
    sparsity: float, size: int, removed: int
) -> None:
    assert Unstructured(sparsity).removed(size) == removed
    mask = Unstructured(sparsity).mask(scores(0, 3, size))
    assert (~mask).sum(dim=1).tolist() == [removed] * 3
    mask = Unstructured(sparsity, "layer").mask(scores(0, 1, size))
    assert int((~mask).sum()) == removed


def test_group_row_and_layer_differ() -> None:
    values = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    row = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    layer = torch.tensor([[0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert torch.equal(Unstructured(0.5).mask(values), row)
    assert torch.equal(Unstructured(0.5, "layer").mask(values), layer)
    assert Unstructured(0.5).accepts(row)
    assert not Unstructured(0.5).accepts(layer)
    assert Unstructured(0.5, "layer").accepts(layer)
    assert Unstructured(0.5, "layer").accepts(row)
    assert not Unstructured(0.5, "layer").accepts(row | layer)


def test_n_of_m_keeps_the_largest_of_each_group() -> None:
    values = torch.tensor([[1.0, 4, 3, 2, 8, 7, 6, 5]])
    expected = {
        NM(2, 4): [0, 1, 1, 0, 1, 1, 0, 0],
        NM(1, 4): [0, 1, 0, 0, 1, 0, 0, 0],
        NM(3, 8): [0, 0, 0, 0, 1, 1, 1, 0],
        NM(4, 4): [1] * 8,
    }
    for pattern, kept in expected.items():
        assert pattern.mask(values)[0].int().tolist() == kept
        assert pattern.accepts(pattern.mask(values))
    assert NM(1, 4).sparsity == 0.75
    assert not NM(2, 4).accepts(torch.tensor([[1, 1, 1, 0, 1, 0, 0, 0]]).bool())
    # four of eight, but not two of each four
    assert not NM(2, 4).accepts(torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]]).bool())


def test_ties_are_removed_from_the_left() -> None:
    same = torch.ones(2, 8)
    right = [False] * 4 + [True] * 4
    assert Unstructured(0.5).mask(same).tolist() == [right, right]
    assert NM(2, 4).mask(same)[0].tolist() == [False, False, True, True] * 2
    some = torch.tensor([[2.0, 1, 1, 0, 1, 3]])
    assert keep_largest(some, 2)[0].int().tolist() == [1, 0, 1, 0, 1, 1]
    assert keep_largest(some, 3)[0].int().tolist() == [1, 0, 0, 0, 1, 1]


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 5),
    size=st.integers(1, 30),
    levels=st.integers(1, 4),
    data=st.data(),
)
def test_keep_largest_against_a_stable_sort(
    seed: int, rows: int, size: int, levels: int, data: st.DataObject
) -> None:
    values = (scores(seed, rows, size) * levels).floor()  # full of ties
    removed = data.draw(st.integers(0, size))
    expected = torch.ones(rows, size, dtype=torch.bool)
    for row in range(rows):
        order = sorted(range(size), key=lambda index: (float(values[row, index]), index))
        expected[row, order[:removed]] = False
    assert torch.equal(keep_largest(values, removed), expected)


def by_plain_sort(values: torch.Tensor, removed: int) -> torch.Tensor:
    """Mask from sorting pairs of a score and its index."""
    kept = torch.ones(values.shape, dtype=torch.bool)
    for row, entries in enumerate(values.tolist()):
        order = sorted(range(len(entries)), key=lambda index: (entries[index], index))
        kept[row, order[:removed]] = False
    return kept


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 40])
@pytest.mark.parametrize("kind", ["distinct", "ties", "infinities", "zeros", "sliced"])
def test_every_way_to_keep_the_largest(dtype: torch.dtype, size: int, kind: str) -> None:
    """Pairs are compared up to a size of 8, from 9 on rows are partitioned."""
    values = scores(size, 12, size).to(dtype)
    if kind == "ties":
        values = (values * 3).floor()
    elif kind == "infinities":
        values[values < 0.3], values[values > 0.8] = -torch.inf, torch.inf
    elif kind == "zeros":
        values = torch.where(values < 0.5, -0.0, 0.0).to(dtype)
    elif kind == "sliced":  # neighbours are not neighbours in memory
        values = scores(size, size, 24).to(dtype).T[::2]
    before = values.clone()
    for removed in range(size + 1):
        mask = keep_largest(values, removed)
        assert torch.equal(mask, by_plain_sort(values, removed))
        assert mask.shape == values.shape
    assert torch.equal(values, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 8, 9, 40])
@pytest.mark.parametrize("removed", [0, 1])
def test_nan_is_refused_by_every_way(dtype: torch.dtype, size: int, removed: int) -> None:
    values = scores(size, 3, size).to(dtype)
    values[1, size // 2] = torch.nan
    with pytest.raises(InvalidProblemError, match="scores contain NaN"):
        keep_largest(values, removed)
    opposite = torch.full((3, size), torch.inf, dtype=dtype)
    opposite[1] = -torch.inf  # their sum is NaN, though none of them is
    assert torch.equal(keep_largest(opposite, removed), by_plain_sort(opposite, removed))


@given(percent=st.integers(0, 99), size=st.integers(1, 500))
@example(percent=29, size=100)  # floor(0.29 * 100) is 28 in floating point
def test_masks_are_accepted_and_neighbours_are_not(percent: int, size: int) -> None:
    pattern = Unstructured(percent / 100)
    mask = pattern.mask(scores(size, 2, size))
    assert (~mask).sum(dim=1).tolist() == [percent * size // 100] * 2
    assert pattern.accepts(mask)
    mask[1, 0] ^= True
    assert not pattern.accepts(mask)


def test_infinite_scores_are_kept_and_nan_is_refused() -> None:
    values = torch.tensor([[float("inf"), 1, 2, float("inf")]])
    assert keep_largest(values, 2)[0].tolist() == [True, False, False, True]
    with pytest.raises(InvalidProblemError, match="scores contain NaN"):
        keep_largest(torch.tensor([[1.0, float("nan")]]), 1)


def test_columns_go_together() -> None:
    values = torch.tensor([[1.0, 9, 2, 2, 0, 8], [1.0, 0, 2, 2, 0, 8]])
    assert (
        Columns(2).mask(values).tolist() == [[False, True, False, False, False, True]] * 2
    )
    units = torch.tensor([0, 0, 1, 1, 2, 2])  # sums 11, 8, 16
    whole = Columns(1, groups=units)
    assert whole.mask(values)[0].tolist() == [False] * 4 + [True] * 2
    scattered = Columns(1, groups=torch.tensor([0, 1, 0, 1, 1, 0]))  # sums 22, 13
    assert scattered.mask(values)[0].tolist() == [True, False, True, False, False, True]
    heads = Columns(1, groups=torch.arange(6), balance=torch.tensor([0, 0, 0, 1, 1, 1]))
    assert heads.mask(values)[0].tolist() == [False, True, False, False, False, True]
    for pattern in (whole, scattered, heads):
        mask = pattern.mask(values)
        assert pattern.accepts(mask)
        assert not pattern.accepts(torch.ones_like(mask))
        mask[1] = ~mask[1]
        assert not pattern.accepts(mask)  # rows disagree
    assert not whole.accepts(torch.tensor([[1, 0, 1, 0, 0, 0]] * 2).bool())


def test_fixed_mask_ignores_scores() -> None:
    kept = scores(1, 4, 6) < 0.5
    pattern = FixedMask(kept)
    assert torch.equal(pattern.mask(scores(2, 4, 6)), kept)
    assert pattern.accepts(kept.clone())
    assert not pattern.accepts(~kept)
    assert pattern.sparsity == pytest.approx(float((~kept).double().mean()))


IMPOSSIBLE: list[tuple[Pattern, tuple[int, int], str]] = [
    (NM(2, 4), (3, 126), "2:4 needs a width divisible by 4, but the weight has 126"),
    (FixedMask(torch.ones(2, 3).bool()), (3, 2), "mask (2, 3) does not fit weight (3, 2)"),
    (Columns(5), (2, 4), "keep must be between 1 and 4 units, got 5"),
    (Columns(0), (2, 4), "keep must be between 1 and 4 units, got 0"),
    (Columns(1, torch.tensor([0, 1])), (2, 4), "groups has shape (2,), expected (4,)"),
    (Columns(1, torch.tensor([0, 2, 2])), (2, 3), "groups must be consecutive integers"),
    (Columns(1, torch.tensor([-1, 0, 1])), (2, 3), "groups must be consecutive integers"),
    (
        Columns(1, torch.tensor([0, 1, 2]), torch.tensor([0, 0])),
        (2, 3),
        "balance has shape (2,), expected (3,)",
    ),
    (
        Columns(1, torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])),
        (2, 3),
        "balance must be consecutive integers",
    ),
    (
        Columns(2, torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1])),
        (2, 3),
        "keep must be between 1 and 1 units, got 2",
    ),
]


@pytest.mark.parametrize(("pattern", "shape", "message"), IMPOSSIBLE, ids=str)
def test_impossible_for_a_shape(
    pattern: Pattern, shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(InvalidProblemError, match=re.escape(message)):
        pattern.check(shape)


def test_n_of_m_mask_checks_the_width() -> None:
    with pytest.raises(InvalidProblemError, match="divisible by 4"):
        NM(2, 4).mask(scores(0, 4, 6))


@pytest.mark.parametrize("sparsity", [1.5, 1.0, -0.1, 50, float("nan"), float("inf")])
def test_impossible_sparsity(sparsity: float) -> None:
    with pytest.raises(InvalidProblemError, match=r"must lie in \[0, 1\), got"):
        Unstructured(sparsity)


@pytest.mark.parametrize(("n", "m"), [(5, 4), (0, 4), (-1, 4), (0, 0)])
def test_impossible_n_of_m(n: int, m: int) -> None:
    with pytest.raises(InvalidProblemError, match=f"0 < n <= m; got {n}:{m}"):
        NM(n, m)


def test_other_impossible_arguments() -> None:
    with pytest.raises(InvalidProblemError, match="group must be 'row' or 'layer'"):
        Unstructured(0.5, "column")  # type: ignore[arg-type]
    with pytest.raises(InvalidProblemError, match="tensor of bool, got float32"):
        FixedMask(torch.ones(2, 2))
    with pytest.raises(InvalidProblemError, match=r"of shape \(2,\)"):
        FixedMask(torch.ones(2).bool())


def test_command_line_form() -> None:
    assert parse_pattern("2:4") == NM(2, 4)
    assert parse_pattern("0.5") == Unstructured(0.5)
    assert parse_pattern("0.5", "layer") == Unstructured(0.5, "layer")
    for text in ("", "half", "2:", ":4", "2:4:8", "2.5:4", "0,5"):
        with pytest.raises(InvalidProblemError, match="fraction"):
            parse_pattern(text)
    for text in ("5:4", "1.5", "nan"):
        with pytest.raises(InvalidProblemError, match="got"):
            parse_pattern(text)


def test_names_for_reports() -> None:
    kept = torch.tensor([[True, False, False, False]])
    patterns = [NM(2, 4), Unstructured(0.5), Unstructured(0.5, "layer"), Columns(3)]
    assert [str(pattern) for pattern in [*patterns, FixedMask(kept)]] == [
        "2:4",
        "0.5",
        "0.5 per layer",
        "3 columns",
        "fixed mask (0.75)",
    ]

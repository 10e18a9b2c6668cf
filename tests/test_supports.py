"""Row supports: every formula and every update against refits from scratch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerwise.errors import MemoryBudgetError
from layerwise.patterns import Unstructured
from layerwise.solvers.refit.supports import Entries, Supports
from tests.support.problems import PROBLEMS, Layer, layers, make_layer
from tests.support.reference import Equations
from tests.support.tolerances import CLOSED_FORM, EQUIVARIANCE

LAYERS = {
    "plain": PROBLEMS["plain"],
    "drifted": PROBLEMS["drifted"],
    "correlated": PROBLEMS["correlated"],
    # half precision of the weight only: moments of half inputs round at 1e-7
    "half-weight": replace(PROBLEMS["plain"], weight=PROBLEMS["plain"].weight.half()),
    "one-column": PROBLEMS["one-column"],
}


def minimum(layer: Layer, mask: Tensor) -> Tensor:
    """Damped objective of every row, refitted by an orthogonal factorization."""
    equations = Equations(layer)
    return torch.from_numpy(equations.objective_rows(equations.least_squares(mask)))


def some_mask(layer: Layer, seed: int = 0) -> Tensor:
    """Rows with different counts; the second keeps all, the third nothing."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(layer.shape, generator=generator) < 0.6
    if len(mask) > 2:
        mask[1], mask[2] = True, False
    return mask


def make(layer: Layer, mask: Tensor, spare: int = 0) -> Supports:
    return Supports(layer.problem(Unstructured(0.5)), every(layer), mask, spare)


def every(layer: Layer) -> Tensor:
    return torch.arange(layer.shape[0])


def all_entries(supports: Supports, rows: Tensor) -> Entries:
    """All columns as candidates, so that nothing is screened away."""
    bound = torch.ones(supports.width, dtype=torch.float64)
    return supports.entries(rows, bound, supports.width)


def flipped(mask: Tensor, row: int, *columns: int) -> Tensor:
    result = mask.clone()
    result[row, list(columns)] ^= True
    return result


def assert_same(supports: Supports, layer: Layer) -> None:
    """Equal to a state that is computed again from the same mask."""
    rows = every(layer)
    fresh = make(layer, supports.mask)
    scale = float(fresh.weight.abs().amax()) if fresh.weight.numel() else 1.0
    torch.testing.assert_close(
        supports.dense(rows), fresh.dense(rows), rtol=0, atol=EQUIVARIANCE * scale
    )
    torch.testing.assert_close(
        scattered(supports), scattered(fresh), rtol=0, atol=spread(fresh)
    )
    kept = supports.index < supports.width
    assert kept.sum(dim=1).tolist() == supports.mask.sum(dim=1).tolist()
    assert not supports.weight[~kept].any()
    assert not supports.inverse[~kept].any()
    for row in range(len(kept)):
        columns = supports.index[row][kept[row]].sort().values
        assert columns.tolist() == supports.mask[row].nonzero()[:, 0].tolist()


def scattered(supports: Supports) -> Tensor:
    """Inverses by column instead of by slot, (rows, in + 1, in + 1)."""
    size = supports.width + 1
    result = torch.zeros(len(supports.mask), size, size, dtype=torch.float64)
    rows = torch.arange(len(supports.mask))[:, None, None]
    result[rows, supports.index[:, :, None], supports.index[:, None, :]] = supports.inverse
    return result


def spread(supports: Supports) -> float:
    largest = float(supports.inverse.abs().amax()) if supports.inverse.numel() else 1.0
    return EQUIVARIANCE * largest


def slack(layer: Layer) -> float:
    return CLOSED_FORM[torch.float64] * layer.energy


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("spare", [0, 3, 100])
def test_fresh_state_is_the_refit(name: str, spare: int) -> None:
    layer = LAYERS[name]
    mask = some_mask(layer)
    supports = make(layer, mask, spare)
    size = min(int(mask.sum(dim=1).amax()) + spare, layer.shape[1])
    assert supports.index.shape == supports.weight.shape == (len(mask), size)
    weight = Equations(layer).least_squares(mask)
    torch.testing.assert_close(
        supports.dense(every(layer)), torch.from_numpy(weight), rtol=0, atol=EQUIVARIANCE
    )
    torch.testing.assert_close(
        supports.objective(), minimum(layer, mask), rtol=0, atol=slack(layer)
    )
    kept_residual = supports.residual(every(layer))[mask]
    assert float(kept_residual.abs().max()) <= slack(layer)


def test_full_rows_share_one_factorization() -> None:
    layer = LAYERS["drifted"]
    full = torch.ones(layer.shape, dtype=torch.bool)
    supports = make(layer, full)
    assert supports.inverse.is_contiguous()  # rows must not share memory
    supports.remove(torch.tensor([0]), torch.tensor([4]))
    assert_same(supports, layer)


@pytest.mark.parametrize("name", LAYERS)
def test_removal_costs_are_differences_of_refits(name: str) -> None:
    layer = LAYERS[name]
    mask = some_mask(layer)
    supports = make(layer, mask, spare=2)
    before = minimum(layer, mask)
    costs = supports.removal_costs(every(layer))
    for row, slot in torch.cartesian_prod(
        every(layer), torch.arange(costs.shape[1])
    ).tolist():
        column = int(supports.index[row, slot])
        if column == supports.width:
            assert costs[row, slot] == torch.inf
            continue
        cost = minimum(layer, flipped(mask, row, column))[row] - before[row]
        assert float(costs[row, slot]) == pytest.approx(float(cost), abs=slack(layer))


@pytest.mark.parametrize("name", LAYERS)
def test_addition_gains_are_differences_of_refits(name: str) -> None:
    layer = LAYERS[name]
    mask = some_mask(layer)
    supports = make(layer, mask)
    before = minimum(layer, mask)
    entries = all_entries(supports, every(layer))
    factor = layer.problem(Unstructured(0.5)).factor(torch.float64)
    bound = entries.rest.square() * factor.inverse_diagonal()[entries.index]
    for row, candidate in torch.cartesian_prod(
        every(layer), torch.arange(supports.width)
    ).tolist():
        column, gain = int(entries.index[row, candidate]), entries.gains[row, candidate]
        if mask[row, column]:
            assert gain == 0
            continue
        after = minimum(layer, flipped(mask, row, column))[row]
        assert float(gain) == pytest.approx(float(before[row] - after), abs=slack(layer))
        assert gain <= bound[row, candidate] + slack(layer)  # what the screening trusts


@pytest.mark.parametrize("name", ["plain", "drifted", "half-weight"])
def test_exchanges_are_differences_of_refits(name: str) -> None:
    layer = LAYERS[name]
    mask = some_mask(layer)
    supports = make(layer, mask, spare=1)
    before = minimum(layer, mask)
    rows = torch.tensor([0, 1, 2, 4])
    entries = all_entries(supports, rows)
    change = supports.exchanges(rows, entries)
    assert change.shape == (4, supports.width, supports.index.shape[1])
    compared = 0
    for at, row in enumerate(rows.tolist()):
        for candidate, slot in torch.cartesian_prod(
            torch.arange(change.shape[1]), torch.arange(change.shape[2])
        ).tolist():
            enters = int(entries.index[at, candidate])
            leaves = int(supports.index[row, slot])
            if mask[row, enters] or leaves == supports.width:
                assert change[at, candidate, slot] == torch.inf
                continue
            after = minimum(layer, flipped(mask, row, enters, leaves))[row]
            expected = float(after - before[row])
            found = float(change[at, candidate, slot])
            assert found == pytest.approx(expected, abs=slack(layer))
            compared += 1
    assert compared > 50


@given(data=st.data())
def test_any_sequence_of_updates_equals_a_fresh_state(data: st.DataObject) -> None:
    layer = data.draw(layers(max_rows=3, max_width=9))
    mask = some_mask(layer, data.draw(st.integers(0, 99), label="mask"))
    supports = make(layer, mask, spare=data.draw(st.integers(0, 9), label="spare"))
    moves = st.sampled_from(["exchange", "add", "remove", "compact"])
    for move in data.draw(st.lists(moves, max_size=12), label="moves"):
        apply(move, supports, data)
    assert_same(supports, layer)
    torch.testing.assert_close(
        supports.objective(), minimum(layer, supports.mask), rtol=0, atol=slack(layer)
    )


def apply(move: str, supports: Supports, data: st.DataObject) -> None:
    """Carry out a move in all rows in which it is possible, in some order."""
    if move == "compact":
        supports.compact()
        return
    kept = supports.mask.sum(dim=1)
    possible = {
        "remove": kept > 0,
        "add": (kept < supports.width) & (kept < supports.index.shape[1]),
        "exchange": (kept > 0) & (kept < supports.width),
    }[move].nonzero()[:, 0]
    if not len(possible):
        return
    rows = torch.tensor(data.draw(st.permutations(possible.tolist()), label="rows"))
    slot = (supports.index[rows] < supports.width).long().argmax(dim=1)
    if move == "remove":
        supports.remove(rows, slot)
        return
    entries = all_entries(supports, rows)
    chosen = entries.gains.argmax(dim=1)
    if not bool((entries.gains.gather(1, chosen[:, None]) > 0).all()):
        return
    if move == "add":
        supports.add(rows, entries, chosen)
    else:
        supports.exchange(rows, entries, chosen, slot)


def test_rows_in_another_order() -> None:
    """All rows, but not in their order: the inverses must be those of the same rows."""
    layer = LAYERS["drifted"]
    supports = make(layer, Unstructured(0.5).mask(layer.weight.abs()))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    sorted_entries = all_entries(supports, every(layer))
    entries = all_entries(supports, order)
    torch.testing.assert_close(entries.schur, sorted_entries.schur[order])
    torch.testing.assert_close(entries.effect, sorted_entries.effect[order])
    torch.testing.assert_close(
        supports.exchanges(order, entries),
        supports.exchanges(every(layer), sorted_entries)[order],
    )


def test_screening_returns_the_largest_promises() -> None:
    layer = make_layer(71, rows=5, width=20, correlation=0.8, drift=0.1)
    mask = Unstructured(0.5).mask(layer.weight.abs())
    supports = make(layer, mask)
    bound = layer.problem(Unstructured(0.5)).factor(torch.float64).inverse_diagonal()
    entries = supports.entries(every(layer), bound, 3)
    assert entries.index.shape == (5, 3)
    assert not mask.gather(1, entries.index).any()
    promise = (supports.residual(every(layer)).square() * bound).masked_fill(mask, -1)
    left_out = promise.scatter(1, entries.index, -1)
    assert bool((promise.gather(1, entries.index).amin(dim=1) >= left_out.amax(1)).all())
    assert supports.entries(every(layer), bound, 99).index.shape == (5, 20)


def test_memory_budget() -> None:
    # four copies of a 10 x 10 inverse, and six arrays of 5 candidates for 10 slots
    assert Supports.chunk(10, 6400) == 2
    assert Supports.chunk(10, 2 * 5600, candidates=5) == 2
    with pytest.raises(MemoryBudgetError, match=r"need 3200 bytes.* is 3199; raise it"):
        Supports.chunk(10, 3199)

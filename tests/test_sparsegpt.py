"""SparseGPT against a slow textbook version that inverts a matrix for every column."""

import pytest
import torch
from torch import Tensor

import layerwise as lw
from layerwise.errors import InvalidProblemError
from layerwise.evaluate import objective_rows
from layerwise.patterns import NM, FixedMask, Pattern, Unstructured
from layerwise.solvers.sparsegpt import SparseGPT
from tests.support.problems import PROBLEMS, Layer, make_layer
from tests.support.tolerances import CLOSED_FORM, EQUIVARIANCE, ROUNDING


def textbook(
    layer: Layer, pattern: Pattern, block: int, damping: float = 0.01
) -> tuple[Tensor, Tensor, float]:
    """Weights, mask and the sum of removal losses, with one inverse per column.

    Optimal brain surgeon from left to right: a removed weight is compensated by all
    weights to its right, and the inverse is that of the gram they share.
    """
    seen, dense = layer.seen, layer.weight
    rows, width = layer.shape
    gram = seen @ seen.T / seen.shape[1]
    ridge = damping * gram.diagonal().mean()
    hessian = gram + ridge * torch.eye(width, dtype=gram.dtype)
    cross = layer.inputs @ seen.T / seen.shape[1]
    weight = (dense @ cross + ridge * dense) @ torch.linalg.inv(hessian)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    step = pattern.m if isinstance(pattern, NM) else block
    mask = torch.ones(rows, width, dtype=torch.bool)
    loss = 0.0
    for begin in range(0, width, step):
        columns = range(begin, min(begin + step, width))
        costs = torch.stack(
            [weight[:, j].square() / inverses[j][0, 0] for j in columns], dim=1
        )
        mask[:, columns.start : columns.stop] = choose(pattern, costs, columns, width)
        for j in columns:
            for row in range(rows):
                if not mask[row, j]:
                    error = weight[row, j] / inverses[j][0, 0]
                    loss += float(weight[row, j] * error)
                    weight[row, j:] -= error * inverses[j][0]
                    weight[row, j] = 0
    return weight, mask, loss


def choose(pattern: Pattern, costs: Tensor, columns: range, width: int) -> Tensor:
    """Mask of one block, by sorting plain numbers."""
    rows, size = costs.shape
    kept = torch.ones(rows, size, dtype=torch.bool)
    if isinstance(pattern, FixedMask):
        return pattern.kept[:, columns.start : columns.stop]
    if isinstance(pattern, Unstructured) and pattern.group == "layer":
        before, after = (
            pattern.removed(rows * end) for end in (columns.start, columns.stop)
        )
        order = costs.reshape(-1).argsort()[: after - before]
        kept.view(-1)[order] = False
        return kept
    if isinstance(pattern, NM):
        removed = pattern.m - pattern.n
    else:
        assert isinstance(pattern, Unstructured)
        removed = pattern.removed(columns.stop) - pattern.removed(columns.start)
    for row in range(rows):
        kept[row, costs[row].argsort()[:removed]] = False
    return kept


LAYERS = {
    "plain": PROBLEMS["plain"],
    "drifted": PROBLEMS["drifted"],
    "few-tokens": PROBLEMS["few-tokens"],
    "one-row": PROBLEMS["one-row"],
    "odd": make_layer(51, rows=4, width=43, tokens=90, drift=0.2, correlation=0.8),
}
PATTERNS = [Unstructured(0.5), Unstructured(0.7, "layer"), NM(2, 4), NM(1, 4)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("block", [1, 7, 128])
def test_against_the_textbook(name: str, pattern: Pattern, block: int) -> None:
    layer = LAYERS[name]
    if isinstance(pattern, NM) and layer.shape[1] % pattern.m:
        layer = make_layer(52, rows=4, width=40, tokens=90, drift=0.2, correlation=0.8)
    solution = lw.solve(layer.problem(pattern), SparseGPT(block_size=block))
    weight, mask, _ = textbook(layer, pattern, block)
    assert torch.equal(solution.mask, mask)
    torch.testing.assert_close(solution.weight, weight, rtol=0, atol=EQUIVARIANCE)


def test_wider_than_two_blocks() -> None:
    layer = make_layer(53, rows=3, width=150, tokens=300, drift=0.2, correlation=0.8)
    for pattern in (Unstructured(0.5), Unstructured(0.6, "layer")):
        solution = lw.solve(layer.problem(pattern), "sparsegpt")
        weight, mask, _ = textbook(layer, pattern, 128)
        assert torch.equal(solution.mask, mask)
        torch.testing.assert_close(solution.weight, weight, rtol=0, atol=EQUIVARIANCE)


@pytest.mark.parametrize("name", LAYERS)
def test_any_block_size_gives_the_weights_of_a_fixed_mask(name: str) -> None:
    layer = LAYERS[name]
    mask = Unstructured(0.6).mask(make_layer(54, *layer.shape).weight)
    problem = layer.problem(FixedMask(mask))
    expected = textbook(layer, FixedMask(mask), 1)[0]
    for block in (1, 7, 16, 17, 128, layer.shape[1]):
        found = lw.solve(problem, SparseGPT(block_size=block))
        assert torch.equal(found.mask, mask)
        torch.testing.assert_close(found.weight, expected, rtol=0, atol=EQUIVARIANCE)


@pytest.mark.parametrize("block", [4, 8, 24, 128])
def test_block_size_does_not_matter_for_n_of_m(block: int) -> None:
    layer = make_layer(55, rows=4, width=48, tokens=90, drift=0.2)
    problem = layer.problem(NM(2, 4))
    expected = lw.solve(problem, SparseGPT(block_size=48))
    found = lw.solve(problem, SparseGPT(block_size=block))
    assert torch.equal(found.mask, expected.mask)
    torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=EQUIVARIANCE)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "pattern", [Unstructured(0.5), Unstructured(0.7, "layer")], ids=str
)
def test_removal_losses_add_up_to_the_objective(name: str, pattern: Pattern) -> None:
    layer = LAYERS[name]
    problem = layer.problem(pattern)
    loss = textbook(layer, pattern, 128)[2]
    everything = FixedMask(torch.ones(layer.shape, dtype=torch.bool))
    best = lw.solve(problem.with_pattern(everything), "least-squares").weight
    found = lw.solve(problem, SparseGPT()).weight
    value, minimum = (
        float(objective_rows(problem, weight, damped=True).sum())
        for weight in (found, best)
    )
    tolerance = CLOSED_FORM[torch.float64]
    assert value - minimum == pytest.approx(
        loss, rel=tolerance, abs=ROUNDING * layer.energy
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("block", [5, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.99])
def test_counts_are_exact(sparsity: float, block: int, dtype: torch.dtype) -> None:
    """The published ``score <= threshold`` removes one too many per block, and all ties."""
    layer = make_layer(56, rows=3, width=100, tokens=120).to(dtype)
    tied = Layer(layer.weight.sign(), layer.inputs)
    for entry in (layer, tied):
        by_row = lw.solve(
            entry.problem(Unstructured(sparsity)), SparseGPT(block_size=block)
        )
        removed = round(100 * sparsity)
        assert (~by_row.mask).sum(dim=1).tolist() == [removed] * 3
        whole = Unstructured(sparsity, "layer")
        by_layer = lw.solve(entry.problem(whole), SparseGPT(block_size=block))
        assert int((~by_layer.mask).sum()) == 3 * removed


def test_damping_that_had_to_be_raised_is_reported() -> None:
    layer = PROBLEMS["few-tokens"]
    assert lw.solve(layer.problem(NM(2, 4), 0.0), "sparsegpt").stats["damping"] > 0
    assert lw.solve(layer.problem(NM(2, 4), 0.1), "sparsegpt").stats["damping"] == 0.1


@pytest.mark.parametrize("exponent", [-80, 80])
def test_scores_stay_in_the_range_of_float32(exponent: int) -> None:
    layer = PROBLEMS["plain-float32"]
    expected = lw.solve(layer.problem(Unstructured(0.5)), "sparsegpt").mask
    scaled = Layer(layer.weight * 2.0**exponent, layer.inputs)
    found = lw.solve(scaled.problem(Unstructured(0.5)), "sparsegpt").mask
    assert torch.equal(found, expected)


def test_block_size_must_be_positive() -> None:
    with pytest.raises(InvalidProblemError, match="block_size must be at least 1, got 0"):
        SparseGPT(block_size=0)

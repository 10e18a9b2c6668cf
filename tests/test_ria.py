"""RIA: relative importance by its definition, and what it is for."""

from dataclasses import replace

import pytest
import torch

import layerwise as lw
from layerwise.errors import UsageError
from layerwise.patterns import Unstructured
from layerwise.solvers.ria import RIA
from tests.support.problems import PROBLEMS, make_layer
from tests.support.tolerances import CLOSED_FORM

HALF = Unstructured(0.5)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_scores_are_the_definition(power: float) -> None:
    layer = PROBLEMS["drifted"]
    scores = RIA(power=power).scores(layer.problem(HALF))
    size = layer.weight.abs()
    for row, column in [(0, 0), (2, 11), (5, 15)]:
        value = size[row, column]
        relative = value / sum(size[:, column]) + value / sum(size[row])
        norm = layer.seen[column].norm() / layer.seen.shape[1] ** 0.5
        expected = float(relative * norm**power)
        found = float(scores[row, column])
        assert found == pytest.approx(expected, rel=CLOSED_FORM[torch.float64])


def test_power_is_the_part_of_the_inputs() -> None:
    layer = PROBLEMS["drifted"]
    sizes = torch.linspace(0.1, 10, layer.shape[1], dtype=torch.float64)
    louder = replace(layer, pruned_inputs=layer.seen * sizes[:, None])
    for power, same in [(0.0, True), (0.5, False)]:
        masks = [lw.solve(x.problem(HALF), RIA(power=power)).mask for x in (layer, louder)]
        assert torch.equal(*masks) == same
    assert RIA().power == 0.5


def test_no_channel_is_removed_as_a_whole() -> None:
    """A channel of small weights on quiet inputs: Wanda drops it, its column saves it."""
    layer = make_layer(31, rows=12, width=16, tokens=200)
    weight = layer.weight.clone()
    weight[:, 4] *= 0.01
    problem = replace(layer, weight=weight).problem(HALF)
    assert not lw.solve(problem, "wanda").mask[:, 4].any()
    assert lw.solve(problem, "ria").mask[:, 4].any()


def test_kept_weights_are_dense_and_zeros_go_first() -> None:
    layer = PROBLEMS["drifted"]
    weight = layer.weight.clone()
    weight[3], weight[:, 2] = 0, 0  # a row and a column without any weight
    solution = lw.solve(replace(layer, weight=weight).problem(HALF), "ria")
    assert torch.equal(solution.weight, torch.where(solution.mask, weight, 0))
    assert not solution.mask[[0, 1, 2, 4, 5], 2].any()


@pytest.mark.parametrize("power", [-0.5, float("nan"), float("inf")])
def test_impossible_power(power: float) -> None:
    with pytest.raises(UsageError, match="power must be a number >= 0"):
        RIA(power=power)

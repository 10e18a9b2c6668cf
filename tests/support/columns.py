"""Layers whose columns are removed, and solvers that do it."""

from typing import Any

import pytest
import torch

import layerwise as lw
from layerwise.evaluate import objective_rows
from layerwise.patterns import Columns, FixedMask
from layerwise.solution import Solution
from layerwise.solvers.columns import ColumnPruning
from tests.support.problems import Layer, make_layer

HALF = Columns(8)


def with_offset(seed: int = 6, drift: float = 0.0, **options: Any) -> Layer:
    """Layer whose inputs have means, which differ between the dense and pruned model."""
    layer = make_layer(seed, drift=drift, **options)
    offset = torch.linspace(-2, 3, layer.shape[1], dtype=torch.float64)[:, None]
    other = None if layer.pruned_inputs is None else layer.pruned_inputs - offset / 2
    return Layer(layer.weight, layer.inputs + offset, other)


LAYERS = {
    "plain": with_offset(),
    "drifted": with_offset(drift=0.3),
    "correlated": with_offset(correlation=0.9),
    "few-tokens": with_offset(tokens=10, drift=0.2),
    "float32": with_offset(drift=0.3).to(torch.float32),
}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def solver(score: str, restoration: str, **options: Any) -> ColumnPruning:
    return ColumnPruning(score=score, restoration=restoration, **options)  # type: ignore[arg-type]


def restored(
    layer: Layer, restoration: str, keep: int = 8, damping: float = 0.01
) -> Solution:
    return lw.solve(layer.problem(Columns(keep), damping), solver("wanda", restoration))


def damped(layer: Layer, solution: Solution) -> float:
    """Damped objective of the problem that the solution answers."""
    problem = layer.problem(HALF)
    if solution.bias is not None:
        problem = problem.centered()
    return float(objective_rows(problem, solution.weight, damped=True).sum())


def some_columns(layer: Layer, keep: int = 8, seed: int = 1) -> FixedMask:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layer.shape[1], generator=generator).expand(layer.shape)
    return FixedMask(Columns(keep).mask(scores))

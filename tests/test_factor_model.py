"""The model of a gram: its directions, and its inverse on every support."""

import pytest
import torch
from torch import Tensor

from layerwise.solvers.refit.factor_model import BLOCK, FactorModel
from tests.support.problems import make_layer
from tests.support.tolerances import CLOSED_FORM

WIDTH = 48
LIMIT = CLOSED_FORM[torch.float64]


def spiked_gram(strengths: Tensor) -> Tensor:
    """Unit diagonal; every strength raises the eigenvalue of two directions."""
    angles = torch.outer(torch.arange(WIDTH), torch.arange(1, len(strengths) + 1))
    phases = 2 * torch.pi * angles.double() / WIDTH
    basis = torch.cat([phases.cos(), phases.sin()], dim=1) * (2 / WIDTH) ** 0.5
    gram = torch.eye(WIDTH, dtype=torch.float64)
    gram = torch.addmm(gram, basis * strengths.repeat(2), basis.T)
    return gram / gram[0, 0]  # waves have a constant diagonal


@pytest.mark.parametrize("rank", [1, 4, 6, 40])
def test_leading_directions(rank: int) -> None:
    gram = spiked_gram(torch.tensor([400.0, 90.0], dtype=torch.float64))
    model = FactorModel.of(gram, rank)
    assert model.rank == min(rank, 4)  # the others are no larger than the rest
    values = torch.linalg.eigvalsh(gram).flip(0)
    expected = values[: model.rank] - model.level
    torch.testing.assert_close(model.values, expected, rtol=1e-6, atol=0)
    rest = (WIDTH - values[: model.rank].sum()) / (WIDTH - model.rank)
    assert model.level == pytest.approx(float(rest), rel=1e-6)
    eye = torch.eye(model.rank, dtype=torch.float64)
    torch.testing.assert_close(model.basis.T @ model.basis, eye, rtol=0, atol=LIMIT)


def test_flat_spectrum_needs_no_directions() -> None:
    model = FactorModel.of(torch.eye(WIDTH, dtype=torch.float64), 8)
    assert model.rank == 0
    assert model.level == 1


def test_same_model_every_time() -> None:
    gram = spiked_gram(torch.tensor([30.0, 9.0], dtype=torch.float64)).float()
    torch.manual_seed(1)
    first = FactorModel.of(gram, 8)
    torch.manual_seed(2)
    assert torch.equal(first.basis, FactorModel.of(gram, 8).basis)


@pytest.mark.parametrize("rank", [0, 3, 40])
def test_inverse_on_every_support(rank: int) -> None:
    strengths = torch.logspace(3, 0, 20, dtype=torch.float64)
    model = FactorModel.of(spiked_gram(strengths), rank)
    assert model.rank > BLOCK or rank < 40
    dense = (model.basis * model.values) @ model.basis.T
    dense.diagonal().add_(model.level)
    kept = make_layer(81, 7, WIDTH).weight > 0
    kept[5], kept[6] = True, False
    rows = make_layer(82, 7, WIDTH).weight * kept
    inverse = model.restricted(kept.double())
    found = inverse.solve(rows, torch.empty_like(rows)) / model.level
    for index, support in enumerate(kept):
        system = dense[support][:, support]
        expected = torch.linalg.solve(system, rows[index, support])
        torch.testing.assert_close(found[index, support], expected, rtol=0, atol=LIMIT)
    assert not found[~kept].any()
    some = torch.tensor([4, 1])
    part = inverse.rows(some).solve(rows[some], torch.empty_like(rows[some]))
    torch.testing.assert_close(part / model.level, found[some], rtol=0, atol=LIMIT)


def test_rows_on_which_the_model_breaks_go_without_it() -> None:
    model = FactorModel(torch.eye(4)[:, :1], torch.tensor([-1.0]), 1.0)
    kept = torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 1]])  # 1 - 1 and 0 - 1 of the direction
    restricted = model.restricted(kept)
    assert not restricted.inverses.any()
    assert torch.equal(restricted.solve(kept, torch.empty(2, 4)), kept)

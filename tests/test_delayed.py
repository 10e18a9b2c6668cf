"""Delayed updates of a matrix against the same updates made at once."""

import pytest
import torch
from torch import Tensor

from layerwise.solvers.column.delayed import WAITING, DelayedMatrix, blocks_of
from tests.support.tolerances import CLOSED_FORM

SIZE = 40
GROUPS = {
    "single": torch.arange(SIZE)[:, None],
    "uneven": torch.cat([torch.arange(SIZE), torch.full((5,), SIZE)]).view(-1, 9),
}


def random_matrix() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    square = torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)
    return square @ square.T


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("rank", [1, 50, WAITING + 1])
def test_delayed_updates_are_those_made_at_once(groups: Tensor, rank: int) -> None:
    matrix = random_matrix()
    delayed, dense = DelayedMatrix(matrix, groups), matrix.clone()
    for step in range(6):
        left = torch.sin(torch.arange(rank * SIZE) + step).double().view(rank, SIZE)
        delayed.subtract(left, left)
        dense -= left.T @ left
        indices = groups[[step % 3]].flatten()
        indices = indices[indices < SIZE]
        torch.testing.assert_close(delayed.rows(indices), dense[indices])
        rows = matrix[indices] * (step + 1)
        delayed.replace(torch.tensor([step % 3]), indices, rows)
        dense[indices], dense[:, indices] = rows, rows.T
        slack = CLOSED_FORM[torch.float64] * float(dense.abs().max())
        expected = blocks_of(dense, groups, groups)
        torch.testing.assert_close(delayed.diagonal, expected, rtol=0, atol=slack)
    torch.testing.assert_close(delayed.settled(), dense)
    delayed.reset(matrix)
    torch.testing.assert_close(delayed.settled(), matrix, rtol=0, atol=0)

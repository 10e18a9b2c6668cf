"""Packed masks: what is unpacked is what was packed, and nothing else is taken."""

import pytest
import torch

from layerwise.errors import DataError, UsageError
from layerwise.run.checkpoints.bitmask import pack_mask, unpack_mask


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (8,), (3, 5), (2, 3, 4)])
def test_mask_survives_packing(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_mask(mask.T.contiguous().T if mask.dim() == 2 else mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == (mask.numel() + 7) // 8
    assert torch.equal(unpack_mask(packed, shape), mask)


def test_first_entry_is_the_lowest_bit() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = True
    assert pack_mask(mask).tolist() == [1, 1]


def test_mask_of_another_shape_is_refused() -> None:
    packed = pack_mask(torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(DataError, match=r"needs uint8 of shape \(1,\)"):
        unpack_mask(packed, (2, 4))
    with pytest.raises(DataError, match="bits set in its padding"):
        unpack_mask(torch.tensor([255], dtype=torch.uint8), (7,))
    with pytest.raises(DataError, match="needs uint8 of shape"):
        unpack_mask(packed.to(torch.int32), (3, 3))
    with pytest.raises(UsageError, match="must be bool"):
        pack_mask(torch.ones(3))

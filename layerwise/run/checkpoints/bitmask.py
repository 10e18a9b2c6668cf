"""Bit-packed masks: one bit per weight instead of one byte.

Bit ``i`` of byte ``b`` (least significant bit first) is entry ``8 b + i`` of the mask
in row-major order; the last byte is padded with zeros. The shape is stored elsewhere.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from layerwise.errors import DataError, UsageError


def packed_size(shape: Sequence[int]) -> int:
    """Bytes of the packed mask of a shape."""
    return -(-math.prod(shape) // 8)


def pack_mask(mask: Tensor) -> Tensor:
    """Bits of a boolean mask of any shape, as uint8 of shape (ceil(entries / 8),)."""
    if mask.dtype != torch.bool:
        message = f"a mask must be bool, not {mask.dtype}: compare or convert it first"
        raise UsageError(message)
    bits = mask.detach().cpu().contiguous().reshape(-1).numpy()
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Boolean mask of ``shape`` from the bytes of :func:`pack_mask`.

    Raises
    ------
    DataError
        The bytes cannot belong to a mask of this shape: wrong type, wrong number, or a
        bit set in the padding.
    """
    entries = math.prod(shape)
    expected = packed_size(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (expected,):
        message = (
            f"packed mask is {packed.dtype} of shape {tuple(packed.shape)}, but a mask of "
            f"shape {tuple(shape)} needs uint8 of shape {(expected,)}: restore the file"
        )
        raise DataError(message)
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if bits[entries:].any():
        message = (
            f"packed mask of shape {tuple(shape)} has bits set in its padding, so it is "
            f"damaged or has another shape: restore the file"
        )
        raise DataError(message)
    return torch.from_numpy(bits[:entries].astype(np.bool_)).reshape(tuple(shape))

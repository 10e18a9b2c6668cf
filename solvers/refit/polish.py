"""A fixed number of conjugate gradient steps on a mask, to compare masks fairly.

The error of rounded weights says little about a mask. A few steps towards its best weights
say much more, at a small part of the cost of an exact refit. No step synchronises with the
device, and none allocates more than one array.
"""

import torch
from torch import Tensor


def polish(
    gram: Tensor,  # (in, in)
    mask: Tensor,  # (rows, in)
    residual: Tensor,  # (rows, in)
    steps: int,
) -> Tensor:  # (rows, in)
    """Change of the weights after Jacobi-preconditioned conjugate gradients on a mask.

    Parameters
    ----------
    gram
        Damped gram, positive definite.
    mask
        True = kept.
    residual
        ``T - weight G`` of the weights to improve.
    steps
        Products with the gram, each 2 rows in^2 operations.
    """
    kept = mask.to(gram.dtype)
    inverse_diagonal = 1 / gram.diagonal()
    rest = residual * kept
    change = torch.zeros_like(rest)
    direction = rest * inverse_diagonal
    energy = (rest * direction).sum(dim=1, keepdim=True)
    for _ in range(steps):
        image = (direction @ gram).mul_(kept)
        curvature = (direction * image).sum(dim=1, keepdim=True)
        length = torch.where(curvature > 0, energy / curvature, 0)
        change.addcmul_(length, direction)
        rest.addcmul_(length, image, value=-1)
        scaled = torch.mul(rest, inverse_diagonal, out=image)
        previous, energy = energy, (rest * scaled).sum(dim=1, keepdim=True)
        direction.mul_(torch.where(previous > 0, energy / previous, 0)).add_(scaled)
    return change

"""The recurrence of Mamba, fast enough on a CPU to train a model.

For every sequence, channel and state ::

    h[t] = exp(dt[t] A) h[t - 1] + dt[t] B[t] x[t],    y[t] = C[t] h[t]

One sequence at a time fits into the cache. The backward pass is explicit, so no step is
recorded or copied, as in the recurrence of transformers. The results are the same.

References
----------
.. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces",
   COLM 2024, arXiv:2312.00752, section 3.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Scan(torch.autograd.Function):
    """Outputs y of one sequence, shape (time, channel), and their derivatives.

    Shapes: (time, channel) for x and dt, (state, channel) for A, (time, state) for B and
    C. Memory: three tensors (time, state, channel).
    """

    @staticmethod
    def forward(  # noqa: D102
        context: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
    ) -> Tensor:
        decay = (dt[:, None] * A).exp_()
        states = B[:, :, None] * (dt * x)[:, None]
        for t in range(1, len(x)):
            states[t].addcmul_(decay[t], states[t - 1])
        context.save_for_backward(x, dt, A, B, C, decay, states)
        return (C[:, None] @ states)[:, 0]

    @staticmethod
    def backward(  # noqa: D102  # pyright: ignore[reportIncompatibleMethodOverride]
        context: Any, *gradients: Tensor
    ) -> tuple[Tensor, ...]:
        x, dt, A, B, C, decay, states = context.saved_tensors
        (dy,) = gradients
        dstates = C[:, :, None] * dy[:, None]
        for t in reversed(range(len(x) - 1)):
            dstates[t].addcmul_(decay[t + 1], dstates[t + 1])
        dC = (states @ dy[:, :, None])[:, :, 0]
        dB = (dstates @ (dt * x)[:, :, None])[:, :, 0]
        dproduct = (B[:, None] @ dstates)[:, 0]  # of dt x
        dexponent = dstates[1:].mul_(states[:-1]).mul_(decay[1:])  # of dt A
        ddt = dproduct * x
        ddt[1:] += (dexponent * A).sum(1)
        dA = dexponent.mul_(dt[1:, None]).sum(0)
        return dproduct * dt, ddt, dA, dB, dC


def selective_scan(
    x: Tensor,  # (batch, channel, time)
    dt: Tensor,  # (batch, channel, time)
    A: Tensor,  # (channel, state)
    B: Tensor,  # (batch, state, time)
    C: Tensor,  # (batch, state, time)
    *,
    D: Tensor,  # (channel,)
    z: Tensor,  # (batch, channel, time)
    delta_bias: Tensor,  # (channel,)
    **_: Any,
) -> Tensor:
    """Replace ``modeling_mamba.mamba_selective_scan``; float32 inside."""
    dt = functional.softplus(dt + delta_bias[:, None])
    inputs = [tensor.mT.float().contiguous() for tensor in (x, dt, B, C)]
    scan: Any = Scan.apply  # untyped in torch
    rows = [scan(x1, dt1, A.T, B1, C1) for x1, dt1, B1, C1 in zip(*inputs, strict=True)]
    return (torch.stack(rows).mT + D[:, None] * x) * functional.silu(z)


@contextmanager
def fast_scan(model: object, device: torch.device) -> Iterator[None]:
    """Use :func:`selective_scan` for a Mamba model on a CPU; other models do not change.

    Calls that request the last state or the package mambapy do not change either.
    """
    module = sys.modules[type(model).__module__]
    original = getattr(module, "mamba_selective_scan", None)
    if original is None or device.type != "cpu":
        yield
        return

    def scan(*args: Any, **options: Any) -> Any:
        if options.get("return_last_state") or options.get("use_mambapy"):
            return original(*args, **options)
        return selective_scan(*args, **options)

    module.mamba_selective_scan = scan  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.mamba_selective_scan = original  # type: ignore[attr-defined]

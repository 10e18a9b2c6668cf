"""Bytes that an optimizer keeps between its steps, measured from its tensors.

States have the names of ``torch.optim``: ``exp_avg`` is a first moment, ``exp_avg_sq`` a
second one. The factors of Adapprox count as second moments.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.optim import Optimizer

FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq", "left", "right")


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the states of an optimizer.

    Parameters
    ----------
    first_moment
        Momentum.
    second_moment
        Running averages of squares, dense or as factors.
    total
        Both, and all other states, such as step counters.
    """

    first_moment: int
    second_moment: int
    total: int


def state_bytes(optimizer: Optimizer) -> StateBytes:
    """Bytes of all state tensors of any optimizer; a shared storage counts once."""
    seen: set[int] = set()
    first = second = total = 0
    for state in optimizer.state.values():
        for name, value in state.items():
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() in seen:
                continue
            seen.add(storage.data_ptr())
            size = storage.nbytes()
            total += size
            first += size if name in FIRST else 0
            second += size if name in SECOND else 0
    return StateBytes(first, second, total)

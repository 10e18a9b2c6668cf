"""The task of a run: from which inputs, statistics and device its problems come."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from layerwise.adapters import Adapter
from layerwise.run.pipeline.gradients import GradientStatistic
from layerwise.run.pipeline.method import Method
from layerwise.run.workers.ranks import ALONE, Ranks

ErrorCorrection = Literal["none", "sequential", "block", "full"]
ERROR_CORRECTIONS: tuple[str, ...] = get_args(ErrorCorrection)


@dataclass(frozen=True)
class Task:
    """How every block is run and measured, for any kind of removal.

    Parameters
    ----------
    adapter
        Declaration of the architecture.
    error_correction
        Which inputs pose a problem, see :mod:`layerwise.run.pipeline.blocks`.
    device
        Where blocks are computed.
    statistics
        Statistics that the solvers read besides the grams, as named in their ``requires``.
    gradient
        Statistic of the gradients of the dense model, if one is needed.
    ranks
        Processes that share the run.
    """

    adapter: Adapter
    error_correction: ErrorCorrection
    device: torch.device
    statistics: frozenset[str] = frozenset()
    gradient: GradientStatistic | None = None
    ranks: Ranks = ALONE

    @property
    def staged(self) -> bool:
        """Whether a stage sees the effect of the pruned stages before it."""
        return self.error_correction in ("block", "full")


def task_of(
    method: Method,
    adapter: Adapter,
    error_correction: ErrorCorrection,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Task:
    """Task with the statistics that a method reads."""
    return Task(
        adapter, error_correction, device, method.statistics, method.gradient, ranks
    )

"""The training loop: AdamW or Adapprox, a linear schedule, several learning rates.

Every learning rate starts from the same values and is evaluated on held-out batches. The
best result is kept, or the initial values if none improves on them. The order of the
batches depends only on the seed and the step, so a resumed run gives the same result.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from layerwise.errors import SolveError, UsageError
from layerwise.limits import check_limit

Optimizer = Literal["adamw", "adapprox"]
OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
WARM_UP = 0.1  # of the steps
HELD_OUT = 1 / 8  # of the batches, at least one


@dataclass(frozen=True)
class Training:
    """Settings of a training.

    Parameters
    ----------
    steps
        Updates per learning rate.
    learning_rates
        Peak values to try.
    optimizer
        ``"adamw"`` or ``"adapprox"``, without weight decay.
    seed
        Seed for the order of the batches.
    save_every
        Steps between two saved states.
    """

    steps: int = 100
    learning_rates: tuple[float, ...] = (1e-3,)
    optimizer: Optimizer = "adamw"
    seed: int = 0
    save_every: int = 50

    def __post_init__(self) -> None:
        if self.steps < 0 or self.save_every < 1:
            message = (
                f"steps must be at least 0 and save_every at least 1, got {self.steps} and "
                f"{self.save_every}"
            )
            raise UsageError(message)
        check_limit("steps", self.steps)
        check_limit("save_every", self.save_every)
        rates = self.learning_rates
        if not rates or not all(0 < rate < math.inf for rate in rates):
            message = (
                f"learning rates must be finite and above 0, got "
                f"{', '.join(map(str, rates))}"
            )
            raise UsageError(message)
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            message = f"optimizer must be one of {known}, got {self.optimizer!r}"
            raise UsageError(message)

    def rate_at(self, step: int, peak: float) -> float:
        """Linear warm-up over a tenth of the steps, then linear decay to zero."""
        warm_up = max(1, round(WARM_UP * self.steps))
        if step < warm_up:
            return peak * (step + 1) / warm_up
        return peak * (self.steps - step) / max(1, self.steps - warm_up)

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Optimizer for some parameters."""
        if self.optimizer == "adapprox":
            from layerwise.solvers.adapprox import Adapprox

            return Adapprox(parameters, lr=0.0, weight_decay=0.0)
        return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)


def split(n_batches: int) -> tuple[range, range]:
    """Training batches, and the held-out ones, which are the last."""
    if n_batches < 2:
        message = (
            "retraining needs at least two batches, one to train and one to hold out: "
            "raise n_sequences or lower batch_size"
        )
        raise UsageError(message)
    held_out = max(1, int(HELD_OUT * n_batches))
    return range(n_batches - held_out), range(n_batches - held_out, n_batches)


def batch_at(step: int, batches: range, seed: int) -> int:
    """Batch of a step: every epoch has its own order."""
    epoch, index = divmod(step, len(batches))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return batches[int(torch.randperm(len(batches), generator=generator)[index])]


class Values(Protocol):
    """Trained parameters that can be reset: :class:`.trainable.Trainable`."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """Parameters that the optimizer updates."""
        ...

    def values(self) -> list[Tensor]:
        """Copies of the trained values."""
        ...

    def set_values(self, values: list[Tensor] | None = None) -> None:
        """Set the trained values, by default to the initial ones."""
        ...


@dataclass
class State:
    """State of a training: everything needed to resume it.

    Parameters
    ----------
    trial, step
        Index of the current learning rate, and the next step.
    losses
        Training losses of this trial.
    best, best_rate, best_values
        Held-out loss, learning rate and values of the best trial so far.
    now, optimizer
        Values and optimizer state in the middle of a trial.
    """

    trial: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    best: float = math.inf
    best_rate: float | None = None
    best_values: list[Tensor] | None = None
    now: list[Tensor] | None = None
    optimizer: Mapping[str, Any] | None = None


OnStep = Callable[[float, int, float], None]  # learning rate, step, loss


def train(
    values: Values,
    loss_of: Callable[[int], Tensor],
    held_out_loss: Callable[[], float],
    batches: range,
    training: Training,
    *,
    state: State | None = None,
    save: Callable[[State], None] = lambda state: None,
    on_step: OnStep = lambda rate, step, loss: None,
) -> State:
    """Train with every learning rate and set the best values.

    Parameters
    ----------
    values
        The trained parameters.
    loss_of
        Loss of a batch by its index, with its graph.
    held_out_loss
        Loss on the held-out batches.
    batches
        Indices of the training batches.
    training
        Steps, learning rates, optimizer.
    state
        State of an interrupted training.
    save
        Called every `save_every` steps and after every learning rate.
    on_step
        Called after every step.

    Raises
    ------
    SolveError
        If the loss of every learning rate is NaN or infinite.
    """
    state = state or State(best=held_out_loss())
    if not math.isfinite(state.best):
        message = f"the loss is {state.best} before any training: check the weights"
        raise SolveError(message)
    failed = 0
    while state.trial < len(training.learning_rates):
        rate = training.learning_rates[state.trial]
        finite = _run(values, loss_of, batches, training, rate, state, save, on_step)
        failed += not finite
        loss = held_out_loss() if finite and training.steps else math.inf
        if loss < state.best:
            state.best, state.best_rate, state.best_values = loss, rate, values.values()
        state.trial, state.step, state.now, state.optimizer = state.trial + 1, 0, None, None
        if state.trial < len(training.learning_rates):
            state.losses = []
        save(state)
    values.set_values(state.best_values)
    if failed == len(training.learning_rates):
        message = (
            f"the loss is not finite with any learning rate of "
            f"{', '.join(f'{r:g}' for r in training.learning_rates)}: lower them"
        )
        raise SolveError(message)
    return state


def _run(
    values: Values,
    loss_of: Callable[[int], Tensor],
    batches: range,
    training: Training,
    rate: float,
    state: State,
    save: Callable[[State], None],
    on_step: OnStep,
) -> bool:
    """Train with one learning rate from its state; return whether its losses are finite."""
    optimizer = training.make(values.parameters)
    values.set_values(state.now)
    if state.optimizer is not None:
        optimizer.load_state_dict(dict(state.optimizer))
    for step in range(state.step, training.steps):
        for group in optimizer.param_groups:
            group["lr"] = training.rate_at(step, rate)
        optimizer.zero_grad()
        loss = loss_of(batch_at(step, batches, training.seed))
        value = float(loss.detach())
        if not math.isfinite(value):
            return False
        loss.backward()  # type: ignore[no-untyped-call]
        try:
            optimizer.step()
        except SolveError:  # Adapprox refuses a gradient that is not finite
            return False
        state.losses.append(value)
        on_step(rate, step, value)
        if (step + 1) % training.save_every == 0 and step + 1 < training.steps:
            state.step, state.now = step + 1, values.values()
            state.optimizer = optimizer.state_dict()
            save(state)
    return True

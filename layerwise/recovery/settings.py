"""Settings of a retraining, checked together before anything is opened."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerwise.errors import UsageError
from layerwise.limits import check_limit
from layerwise.recovery.reconstruct import Reconstruction
from layerwise.recovery.trainable import ParameterSets
from layerwise.recovery.training import Training
from layerwise.recovery.units import OBJECTIVES
from layerwise.run.data.calibration import Calibration

LEARNING_RATES: Mapping[str, float] = {
    "biases": 1e-2,
    "norms": 1e-2,
    "head": 1e-2,
    "lora-prune": 1e-2,
    "scale-lora": 1e-2,
    "masklora": 1e-2,
    "full": 1e-3,
}
WIDTH = 128  # hidden size of the models with these rates; wider models use lower rates


@dataclass(frozen=True)
class Settings:
    """Arguments of :func:`layerwise.recovery.retrain.retrain_model` that decide its result.

    Parameters
    ----------
    parameters, objective, steps, learning_rate, rank, scale, batch_size, optimizer
        As for `retrain_model`.
    error_correction, seed, save_every
        As for `retrain_model`.

    Raises
    ------
    UsageError
        If an argument is impossible, or two contradict each other.
    """

    parameters: str
    objective: str
    steps: int
    learning_rate: float | Sequence[float] | None
    rank: int
    scale: float
    batch_size: int
    optimizer: str
    error_correction: str
    seed: int
    save_every: int

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            message = f"objective must be one of {known}, got {self.objective!r}"
            raise UsageError(message)
        if self.batch_size < 1:
            message = f"batch_size must be at least 1, got {self.batch_size}"
            raise UsageError(message)
        check_limit("batch_size", self.batch_size)
        if self.reconstructs and "head" in self.sets.names:
            message = "the set head trains the LM head: choose the objective tokens"
            raise UsageError(message)
        self.reconstruction(WIDTH, torch.device("cpu"))

    @property
    def reconstructs(self) -> bool:
        """Whether the objective is a reconstruction, which needs the dense model."""
        return self.objective != "tokens"

    @property
    def sets(self) -> ParameterSets:
        """Parameter sets."""
        return ParameterSets(tuple(self.parameters.split("+")), self.rank, self.scale)

    def rates(self, width: int) -> tuple[float, ...]:
        """Learning rates to try; by default one, inversely proportional to the width."""
        if self.learning_rate is None:
            least = min(LEARNING_RATES[name] for name in self.sets.names)
            return (least * min(1.0, WIDTH / width),)
        if isinstance(self.learning_rate, int | float):
            return (float(self.learning_rate),)
        return tuple(float(rate) for rate in self.learning_rate)

    def training(self, width: int) -> Training:
        """Training settings for a model of this hidden size."""
        return Training(
            self.steps,
            self.rates(width),
            self.optimizer,  # type: ignore[arg-type]
            self.seed,
            self.save_every,
        )

    def reconstruction(self, width: int, device: torch.device) -> Reconstruction:
        """Settings for the reconstruction of every block."""
        return Reconstruction(
            self.sets,
            self.training(width),
            self.objective,
            self.error_correction,
            device,
        )

    def to_dict(self, width: int, tokens: Calibration) -> dict[str, Any]:
        """Plain values of everything that decides the result."""
        settings: dict[str, Any] = {
            "parameters": self.parameters,
            "objective": self.objective,
            "steps": self.steps,
            "learning_rate": list(self.rates(width)),
            "rank": self.rank,
            "scale": self.scale,
            "batch_size": self.batch_size,
            "optimizer": self.optimizer,
            "calibration": tokens.source,
            "n_sequences": tokens.tokens.shape[0],
            "sequence_length": tokens.tokens.shape[1],
            "seed": self.seed,
            "bos": "never" if tokens.bos is None else "always",
        }
        if self.reconstructs:
            settings["error_correction"] = self.error_correction
        return settings

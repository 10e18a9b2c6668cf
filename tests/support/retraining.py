"""Short retrainings of tiny pruned models: the settings that the tests share."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.recovery.records import UnitRecord
from layerwise.recovery.retrain import RetrainReport, retrain_model
from tests.support.models import random_tokens, tiny_model
from tests.support.pruning import prune

TOKENS = random_tokens(16, 12, seed=3)


def pruned_model(family: str, sparsity: Any = 0.5, **more: Any) -> tuple[Any, Any]:
    """A model pruned by Wanda, and its masks by parameter name."""
    model = tiny_model(family, **more)
    return model, prune(model, "wanda", sparsity).masks


def retrain(model: Any, **options: Any) -> RetrainReport:
    """Few steps on four batches of four windows."""
    given: dict[str, Any] = {
        "calibration": TOKENS,
        "n_sequences": len(TOKENS),
        "sequence_length": TOKENS.shape[1],
        "batch_size": 4,
        "steps": 6,
        "rank": 2,
        **options,
    }
    return retrain_model(model, **given)


def zeros_kept(model: Any, masks: Mapping[str, Tensor]) -> bool:
    """Whether every removed weight is zero, and no zero is negative."""
    own = dict(model.named_parameters())
    return all(
        bool((own[name][~mask] == 0).all())
        and not bool(torch.signbit(own[name][~mask]).any())
        for name, mask in masks.items()
    )


def values(model: Any) -> dict[str, Tensor]:
    """Copies of all parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Listener:
    """Records its calls."""

    def __init__(self) -> None:
        self.records: list[UnitRecord] = []
        self.steps: list[tuple[float, int, float]] = []
        self.total = 0

    def on_start(self, total: int, per_unit: int) -> None:
        self.total = total

    def on_step(self, learning_rate: float, step: int, loss: float) -> None:
        self.steps.append((learning_rate, step, loss))

    def on_unit(self, record: UnitRecord) -> None:
        self.records.append(record)

    def on_finish(self, report: Any) -> None: ...

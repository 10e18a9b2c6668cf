"""Checkpoints to plan for, and a large machine that is not measured."""

from pathlib import Path
from typing import Any

import torch

from layerwise.run.capacity import Capacity
from layerwise.timing.floor import Machine
from tests.support.models import save_checkpoint, tiny_model

LARGE = Capacity(1 << 40, None, 1 << 40)


def saved(folder: Path, family: str, **more: Any) -> tuple[Path, Any]:
    model = tiny_model(family, **more)
    return save_checkpoint(folder / family, model, tokenizer=False), model


class FixedRates(Machine):
    """A machine that is not measured, which would take most of the time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.gemm_rates = dict.fromkeys((torch.bfloat16, torch.float32, torch.float64), 1e9)
        self._copy_rate = 1e9

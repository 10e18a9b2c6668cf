"""What a plan says, for Python and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import LayerwiseError
from layerwise.planning.estimate import StageEstimate
from layerwise.planning.inventory import Group
from layerwise.planning.memory_model import Memory, Place
from layerwise.planning.shapes import ModelShape
from layerwise.run.capacity import Capacity
from layerwise.run.checkpoints.atomic import atomic_write


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Parameters
    ----------
    model, method, pattern, error_correction, device
        What was asked, as the recipe of a run would name it.
    n_sequences, length
        Of the calibration set.
    groups
        Every parameter of the model, and what the run does with it.
    streamed
        Whether one block at a time is in memory, and not the whole model.
    on_disk
        Whether the hidden states between two blocks are files.
    sizes, memory
        Shapes behind the memory, and what is alive at the largest moments.
    disk
        Bytes by what they are, while the output is written.
    capacity
        What is free on this machine.
    stages
        Work, floor and expected time.
    gemm_rates, copy_rate
        Operations by type of number, and bytes, per second of this machine.
    refusal
        Why such a run would not start or not end, the first of all reasons.
    notes
        What the figures do not cover.
    """

    model: str
    method: str
    pattern: str
    error_correction: str
    device: str
    n_sequences: int
    length: int
    groups: tuple[Group, ...]
    streamed: bool
    on_disk: bool
    sizes: ModelShape
    memory: Memory
    disk: Mapping[str, int]
    capacity: Capacity
    stages: tuple[StageEstimate, ...]
    gemm_rates: Mapping[torch.dtype, float]
    copy_rate: float
    refusal: LayerwiseError | None
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All parameters of the model, tied ones once."""
        return sum(group.parameters for group in self.groups)

    @property
    def pruned(self) -> int:
        """Entries of the matrices that are pruned."""
        return sum(g.parameters for g in self.groups if g.status == "pruned")

    @property
    def zeros(self) -> int:
        """Entries that the pattern removes."""
        return sum(group.zeros for group in self.groups)

    def check(self) -> None:
        """Raise the reason for which such a run would not start or not end, if any."""
        if self.refusal is not None:
            raise self.refusal

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can hold it: bytes, seconds, operations."""
        asked = ("model", "method", "pattern", "error_correction", "device")
        places: tuple[Place, ...] = (
            ("host",) if self.device == "cpu" else ("host", "device")
        )
        widest = self.sizes.widest
        return {
            **{name: getattr(self, name) for name in asked},
            "n_sequences": self.n_sequences,
            "sequence_length": self.length,
            "streamed": self.streamed,
            "activations": "disk" if self.on_disk else "memory",
            "parameters": self.parameters,
            "pruned_parameters": self.pruned,
            "zeros": self.zeros,
            "layers": [_as_json(group) for group in self.groups],
            "memory": {
                place: {
                    "peak": self.memory.bytes(place),
                    "moment": self.memory.peak(place).name,
                    "moments": {
                        moment.name: {
                            item.name: item.bytes
                            for item in moment.items
                            if item.place == place
                        }
                        for moment in self.memory.moments
                    },
                }
                for place in places
            },
            "largest_gram": None if widest is None else widest.width,
            "disk": dict(self.disk),
            "free": asdict(self.capacity),
            "stages": [
                {
                    "stage": stage.stage,
                    "operations": {
                        _short(dtype): count for dtype, count in stage.work.flops.items()
                    },
                    "bytes": stage.work.bytes,
                    "floor_seconds": stage.floor,
                    "expected_seconds": stage.seconds,
                }
                for stage in self.stages
            ],
            "refused": None if self.refusal is None else str(self.refusal),
            "notes": list(self.notes),
        }

    def write(self, path: Path) -> None:
        """Write :meth:`to_dict` as a JSON file."""
        atomic_write(path, (json.dumps(self.to_dict(), indent=1) + "\n").encode())


def _as_json(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "count": group.count,
        "members": list(group.members),
        "shape": list(group.shape),
        "parameters": group.parameters,
        "fate": group.status,
        "reason": group.reason,
        "zeros": group.zeros,
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

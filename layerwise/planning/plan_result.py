"""Result of a plan, for Python and as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import LayerwiseError
from layerwise.planning.estimate import StageEstimate
from layerwise.planning.inventory import Group
from layerwise.planning.memory_model import Memory, MemoryKind
from layerwise.planning.shapes import ModelShape
from layerwise.run.capacity import Capacity
from layerwise.run.checkpoints.atomic import atomic_write


@dataclass(frozen=True)
class Plan:
    """Plan of a run.

    Parameters
    ----------
    model, method, pattern, error_correction, device
        The requested settings, as in the recipe of a run.
    n_sequences, length
        Number of calibration sequences, and their tokens.
    groups
        Every parameter of the model, and what the run does with it.
    streamed
        Whether one block at a time is in memory instead of the whole model.
    on_disk
        Whether the hidden states between two blocks are files.
    sizes, memory
        Shapes of the model, and the memory at the largest instants.
    disk
        Bytes on the disk while the output is written, by kind.
    capacity
        Free memory and disk space of this machine.
    stages
        Work, floor and expected time.
    gemm_rates, copy_rate
        Operations per second by type of number, and copied bytes per second.
    refusal
        First reason why such a run would not start or not finish, or None.
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
        """Number of parameters of the model; tied ones count once."""
        return sum(group.parameters for group in self.groups)

    @property
    def pruned(self) -> int:
        """Number of entries of the pruned matrices."""
        return sum(g.parameters for g in self.groups if g.status == "pruned")

    @property
    def zeros(self) -> int:
        """Number of entries that the pattern removes."""
        return sum(group.zeros for group in self.groups)

    def check(self) -> None:
        """Raise the reason why such a run would not start or not finish, if any."""
        if self.refusal is not None:
            raise self.refusal

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: bytes, seconds, operations."""
        settings = ("model", "method", "pattern", "error_correction", "device")
        kinds: tuple[MemoryKind, ...] = (
            ("host",) if self.device == "cpu" else ("host", "device")
        )
        widest = self.sizes.widest
        return {
            **{name: getattr(self, name) for name in settings},
            "n_sequences": self.n_sequences,
            "sequence_length": self.length,
            "streamed": self.streamed,
            "activations": "disk" if self.on_disk else "memory",
            "parameters": self.parameters,
            "pruned_parameters": self.pruned,
            "zeros": self.zeros,
            "layers": [_as_json(group) for group in self.groups],
            "memory": {
                kind: {
                    "peak": self.memory.bytes(kind),
                    "moment": self.memory.peak(kind).name,
                    "moments": {
                        moment.name: {
                            item.name: item.bytes
                            for item in moment.items
                            if item.kind == kind
                        }
                        for moment in self.memory.instants
                    },
                }
                for kind in kinds
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

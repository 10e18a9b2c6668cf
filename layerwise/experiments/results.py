"""Results of experiments on disk, so that a long comparison can be interrupted.

One JSON object per line: the task, the fingerprint of everything that decides the result,
and the result. A result with another fingerprint is not used: code, weights or text have
changed since.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.errors import DataError
from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.run.checkpoints.strict_json import parse_json
from layerwise.run.pipeline.records import LayerRecord

FIELDS = {"task", "fingerprint", "result"}

Json = Mapping[str, Any]


class ResultStore:
    """Results by task; with a path, every new one is on disk before `add` returns.

    Parameters
    ----------
    path
        File to continue or to create; None keeps results in memory only.

    Raises
    ------
    DataError
        The file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                row = parse_json(line, f"{path}, line {number},")
                if not isinstance(row, dict) or set(row) != FIELDS:
                    message = f"{path}, line {number}, is not a result: delete the file"
                    raise DataError(message)
                self._rows[_key(row["task"])] = row

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, task: Json, fingerprint: str) -> dict[str, Any] | None:
        """Result of a task; None if there is none with this fingerprint."""
        row = self._rows.get(_key(task))
        if row is None or row["fingerprint"] != fingerprint:
            return None
        result: dict[str, Any] = row["result"]
        return result

    def add(self, task: Json, fingerprint: str, result: Json) -> None:
        """Store a result; it replaces an earlier one of the same task."""
        row = {"task": dict(task), "fingerprint": fingerprint, "result": dict(result)}
        self._rows[_key(task)] = row
        if self._path is not None:
            lines = (json.dumps(row, sort_keys=True) + "\n" for row in self._rows.values())
            atomic_write(self._path, "".join(lines).encode())


def _key(task: Json) -> str:
    return json.dumps(task, sort_keys=True)


@dataclass(frozen=True)
class MethodResult:
    """One model, pruned by one method to one pattern.

    Parameters
    ----------
    model, method, pattern
        Names from the experiment.
    perplexity
        Perplexity of the pruned model on held-out text.
    mean_relative_error
        Mean over the pruned layers.
    seconds
        Wall time of the pruning run.
    records
        Records of the pruned layers, in order.
    """

    model: str
    method: str
    pattern: str
    perplexity: float
    mean_relative_error: float
    seconds: float
    records: tuple[LayerRecord, ...]

"""Jobs that any process can do: one stored layer, one method, one pattern.

A job contains everything that decides its result, apart from the file of the layer. It can
be pickled, and doing it twice gives the same result. A process caches the last file that it
read, so jobs should come in the order of the files.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from layerwise.grams.layer_files import StoredLayer, read_file
from layerwise.moments import Moments
from layerwise.run.pipeline.block_files import write_block
from layerwise.run.pipeline.matrix import solve_matrix
from layerwise.run.pipeline.records import LayerRecord
from layerwise.run.pipeline.results import PrunedBlock
from layerwise.run.pipeline.zeros import ZeroWeights
from layerwise.run.workers.messages import WorkerSpec


@dataclass(frozen=True)
class LayerJob:
    """Everything that decides the solution of one layer.

    Parameters
    ----------
    file, name
        The layer, in a file of :mod:`layerwise.grams.layer_files`.
    zeros
        The pattern and the method.
    device
        Device of the computation.
    folder, index, run
        Folder, number and key of the run under which weight, mask and figures are written,
        as a block of a :class:`~layerwise.run.pipeline.journal.Journal`; None: nothing is
        written.
    """

    file: Path
    name: str
    zeros: ZeroWeights
    device: str = "cpu"
    folder: Path | None = None
    index: int = 0
    run: str = ""

    @property
    def variant(self) -> tuple[Any, ...]:
        """Key of the jobs of a file that share their factorizations."""
        return self.zeros.method.solver, self.zeros.pattern


@dataclass(frozen=True)
class SolvedLayer:
    """Result of a job: figures, and the name of the file that was written, or None."""

    record: LayerRecord
    file: str | None = None


def solve_layer(job: LayerJob) -> SolvedLayer:
    """Do a job: solve the layer, and write its file if requested.

    Raises
    ------
    DataError
        The file is damaged or holds impossible moments.
    SolveError
        The layer failed numerically.
    """
    device = torch.device(job.device)
    method, pattern = job.zeros.method, job.zeros.pattern
    layer = _layers(job.file, device).of(job.variant)[job.name]
    solved = solve_matrix(method, job.name, partial(layer.problem, pattern, method.damping))
    if job.folder is None:
        return SolvedLayer(solved.record)
    block = PrunedBlock(
        {job.name: solved.weight.cpu()}, {job.name: solved.mask.cpu()}, [solved.record]
    )
    file = write_block(job.folder, job.index, block, job.run)
    return SolvedLayer(solved.record, file)


def open_layers(spec: WorkerSpec) -> Callable[[LayerJob], SolvedLayer]:
    """Work of a process: do jobs on its own device."""
    return partial(_solve_at, spec.device)


def _solve_at(device: str, job: LayerJob) -> SolvedLayer:
    return solve_layer(replace(job, device=device))


def forget_files() -> None:
    """Free the memory of the cached file."""
    _layers.cache_clear()


class _Layers:
    """Layers of a file, with the cached results of their moments.

    Every method and pattern starts with empty caches. So seconds are those of a prune, and
    memory does not grow with the number of methods.
    """

    def __init__(self, layers: dict[str, StoredLayer]) -> None:
        self._layers = layers
        self._variant: tuple[Any, ...] | None = None

    def of(self, variant: tuple[Any, ...]) -> dict[str, StoredLayer]:
        if variant != self._variant:
            fresh: dict[int, Moments] = {}
            for name, layer in self._layers.items():
                key = id(layer.moments)
                fresh.setdefault(key, replace(layer.moments))
                self._layers[name] = replace(layer, moments=fresh[key])
            self._variant = variant
        return self._layers


@lru_cache(maxsize=1)
def _layers(file: Path, device: torch.device) -> _Layers:
    layers = {}
    moved: dict[int, Moments] = {}
    for layer in read_file(file):
        on_device = layer.on(device)
        shared = moved.setdefault(id(layer.moments), on_device.moments)
        layers[layer.name] = replace(on_device, moments=shared)
    return _Layers(layers)

"""Seconds of every stage of a pruning run, next to the floors of this machine.

:func:`layerwise.run.prune.prune_model` runs from a folder into a folder, on random token
ids. A random model that is too large for the memory is pruned in pieces of a few blocks,
and the times are added up. So each piece has the inputs of a first block, and the output of
its last block is not computed.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from layerwise.errors import UsageError
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.data.context import context_length
from layerwise.run.data.windows import check_windows
from layerwise.run.models.architecture import adapter_of
from layerwise.run.models.loading import quiet_transformers
from layerwise.run.models.stock import skeleton
from layerwise.run.pipeline.task import ErrorCorrection
from layerwise.run.prune import prune_model
from layerwise.run.settings import choose_device
from layerwise.run.stopwatch import Stopwatch
from layerwise.solver import SolverLike
from layerwise.timing.floor import Machine, Work, run_work
from layerwise.timing.shapes import SHAPES, piece_size, random_model

STAGES: tuple[str, ...] = (
    *("load", "hash", "capture", "gradients", "survey"),
    *("forward", "gram", "solve", "certify", "write"),
)
REST = "rest"
DISK_STAGES = ("load", "hash", "write")
LONGEST = 512  # largest default sequence length
N_SEQUENCES = 16


@dataclass(frozen=True)
class StageTime:
    """One stage of a run.

    Parameters
    ----------
    stage
        Name of the stage.
    seconds
        Wall time.
    work
        Counted work.
    floor
        Least seconds for the counted work; zero if nothing is counted.
    """

    stage: str
    seconds: float
    work: Work
    floor: float

    @property
    def ratio(self) -> float | None:
        """Seconds divided by the floor."""
        return self.seconds / self.floor if self.floor else None


@dataclass(frozen=True)
class Bench:
    """Stages of a run, and the measured rates of the machine.

    Parameters
    ----------
    title
        Model, method and size of the run.
    stages
        Stages in the order of the run; the last one is the rest.
    gemm_rates
        Operations per second by data type.
    copy_rate
        Bytes per second.
    """

    title: str
    stages: tuple[StageTime, ...]
    gemm_rates: dict[torch.dtype, float]
    copy_rate: float

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)


def bench(
    model: str | Path | None = None,
    *,
    shape: str | None = None,
    blocks: int | None = None,
    method: SolverLike = "wanda",
    sparsity: str = "0.5",
    n_sequences: int = N_SEQUENCES,
    sequence_length: int | None = None,
    error_correction: ErrorCorrection = "block",
    device: str | torch.device = "auto",
    seed: int = 0,
) -> Bench:
    """Prune a model, or a random model of a named shape, and time the stages.

    Parameters
    ----------
    model
        Checkpoint folder or hub name.
    shape
        Name in :data:`layerwise.timing.shapes.SHAPES`, instead of `model`.
    blocks
        Number of blocks of a shape; all by default.
    method, sparsity, error_correction
        As for :func:`~layerwise.run.prune.prune_model`.
    n_sequences, sequence_length
        Size of the random calibration set; the default length is the number of positions
        of the model, at most 512.
    device
        Where to compute.
    seed
        Seed of weights and token ids.
    """
    if (model is None) == (shape is None):
        message = "give either a model folder or a shape: exactly one of the two"
        raise UsageError(message)
    if blocks is not None and (shape is None or blocks < 1):
        message = f"blocks is the number of blocks of a shape, at least 1; got {blocks}"
        raise UsageError(message)
    run = _Run(
        method,
        sparsity,
        n_sequences,
        sequence_length,
        error_correction,
        choose_device(device),
        seed,
    )
    with tempfile.TemporaryDirectory(prefix="layerwise-bench-") as folder:
        if shape is None:
            assert model is not None
            run.prune(model, Path(folder) / "out")
            name = str(model)
        else:
            name = _prune_shape(run, shape, blocks, Path(folder))
    return run.result(f"{name}: {method} {sparsity}, {n_sequences} x {run.length} tokens")


def _prune_shape(run: "_Run", shape: str, blocks: int | None, folder: Path) -> str:
    """Prune a random model piece by piece; return its name for the title."""
    if shape not in SHAPES:
        message = f"unknown shape {shape!r}; known: {', '.join(SHAPES)}"
        raise UsageError(message)
    config = SHAPES[shape]()
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    total = config.num_hidden_layers
    left = min(blocks or total, total)
    name = f"{left} of the {total} blocks of {shape}, random {dtype}"
    piece = piece_size(config, dtype)
    number = 0
    while left:
        now = min(piece, left)
        source, out = folder / f"source-{number}", folder / f"out-{number}"
        model = random_model(config, now, dtype, run.seed + number)
        with quiet_transformers():
            model.save_pretrained(source)
        del model
        run.prune(source, out)
        shutil.rmtree(source)
        shutil.rmtree(out)
        left, number = left - now, number + 1
    return name.replace("torch.", "")


class _Run:
    """Settings of the runs, with their times and work so far."""

    def __init__(
        self,
        method: SolverLike,
        sparsity: str,
        n_sequences: int,
        sequence_length: int | None,
        error_correction: ErrorCorrection,
        device: torch.device,
        seed: int,
    ) -> None:
        self.device, self.seed, self.length = device, seed, sequence_length or 0
        self._method, self._sparsity = method, sparsity
        self._n_sequences = n_sequences
        self._error_correction: ErrorCorrection = error_correction
        self._seconds: dict[str, float] = dict.fromkeys((*STAGES, REST), 0.0)
        self._work: dict[str, Work] = {}

    def prune(self, source: str | Path, output: Path) -> None:
        """Prune a folder into another one and add up its stages."""
        checkpoint = Checkpoint.open(source)
        config = checkpoint.config.get("text_config") or checkpoint.config
        if not self.length:
            self.length = min(LONGEST, context_length(SimpleNamespace(**config)) or LONGEST)
        check_windows(self._n_sequences, self.length, self.seed)
        vocabulary = int(config["vocab_size"])
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self._n_sequences, self.length)
        ids = torch.randint(vocabulary, shape, generator=generator)
        start = time.perf_counter()
        with Stopwatch(self.device) as watch:
            report = prune_model(
                source,
                self._method,
                self._sparsity,
                calibration=ids,
                n_sequences=self._n_sequences,
                sequence_length=self.length,
                error_correction=self._error_correction,
                device=self.device,
                output_dir=output,
            )
        total = time.perf_counter() - start
        for stage, seconds in watch.seconds.items():
            self._seconds[stage] += seconds
        self._seconds[REST] += total - sum(watch.seconds.values())
        work = run_work(
            _before_pruning(report.model, checkpoint),
            adapter_of(report.model),
            {record.name: record.shape for record in report.records},
            self._error_correction,
            ids.numel(),
            self.length,
            self.device,
        )
        read = Work(bytes=_size(checkpoint.path))
        work |= {"load": read, "hash": read, "write": Work(bytes=_size(output))}
        for stage, more in work.items():
            self._work[stage] = self._work.get(stage, Work()) + more

    def result(self, title: str) -> Bench:
        """Stages that took time or have work, with their floors."""
        machine = Machine(self.device)
        disk = machine if self.device.type == "cpu" else Machine(torch.device("cpu"))
        stages = []
        for stage, seconds in self._seconds.items():
            work = self._work.get(stage, Work())
            if seconds or work.total_flops or work.bytes:
                floor = (disk if stage in DISK_STAGES else machine).floor(work)
                stages.append(StageTime(stage, seconds, work, floor))
        return Bench(title, tuple(stages), dict(machine.gemm_rates), machine.copy_rate)


def _before_pruning(model: Any, checkpoint: Checkpoint) -> Any:
    """Model of the source on the meta device: the run may have made its model smaller."""
    config = type(model.config).from_dict(checkpoint.config)
    return skeleton(model, config).to(model.dtype)


def _size(folder: Path) -> float:
    """Bytes of the weights in a folder."""
    return float(sum(path.stat().st_size for path in folder.glob("*.safetensors")))

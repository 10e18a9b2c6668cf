"""The GPU programme: all stages at the shapes of Llama-3-8B, OPT-125M and LLaMA-30B.

    PYTHONPATH=. python -m tests.benchmarks.gpu --output gpu.json
    PYTHONPATH=. python -m tests.benchmarks.gpu --output small.json --small

One command within nine minutes on one H200, one JSON file, written again after every
stage. First the ceilings of the machine: matrix products in four precisions, and a copy.
Then one decoder block of every model is measured, stage by stage; seconds of the model are
those of the block times its blocks, and are given only if the whole block was measured. The
first group of a block goes through all stages before, on data of its own: it pays for
kernels that are loaded and compiled, and proves nothing. Every stage has a share of the
time, at which it is stopped; one that fails is recorded, the others go on, and the exit
code is 1. ``--small`` runs everything on small shapes, with or without a GPU, in less than
two minutes.
"""

import argparse
import gc
import json
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from layerwise.run.checkpoints.atomic import atomic_write
from layerwise.timing.floor import Machine
from tests.benchmarks.gpu_layers import (
    FULL,
    FULL_RESTORED,
    SMALL,
    SMALL_RESTORED,
    Block,
    LayerSet,
    warm_up,
)
from tests.benchmarks.gpu_stages import (
    PREPARATION,
    RESTORATION,
    STAGES,
    Rates,
    Stage,
)

LIMIT, SMALL_LIMIT = 520.0, 110.0  # seconds; the rest is for imports and the last stage
TOKENS, SMALL_TOKENS = 262144, 4096
SMALL_GEMM, SMALL_COPY = 512, 1 << 26
DONE = "done"


class OutOfTime(BaseException):
    """A stage has used up its share of the time; nothing on the way may handle it."""


class Programme:
    """Runs stages one after the other and keeps a record of each.

    Parameters
    ----------
    output
        JSON file.
    device
        Where to compute.
    small
        Whether shapes are small.
    """

    def __init__(self, output: Path, device: torch.device, small: bool) -> None:
        self._output, self._device = output, device
        self._start = time.perf_counter()
        self._limit = SMALL_LIMIT if small else LIMIT
        self._tokens = SMALL_TOKENS if small else TOKENS
        cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if cuda else platform.processor()
        self._small = small
        self.record: dict[str, Any] = {
            "device": f"{device.type}: {name}",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "float32_products": torch.get_float32_matmul_precision(),
            "float32_override": os.environ.get("NVIDIA_TF32_OVERRIDE"),
            "small": small,
            "tokens": self._tokens,
            "stages": [],
        }

    @property
    def failed(self) -> list[str]:
        """Stages that did not end as they should."""
        return [
            f"{stage['model']} {stage['stage']}"
            for stage in self.record["stages"]
            if stage["status"] != DONE
        ]

    def measure(self) -> Rates:
        """Ceilings of the machine."""
        size, copied = (SMALL_GEMM, SMALL_COPY) if self._small else (None, None)
        machine, tensor = (Machine(self._device, size, copied) for _ in range(2))
        with tf32(self._device):
            fast = tensor.gemm_rate(torch.float32)
        rates = Rates(
            machine.gemm_rate(torch.bfloat16),
            fast,
            machine.gemm_rate(torch.float32),
            machine.gemm_rate(torch.float64),
            machine.copy_rate,
        )
        self.record["ceilings"] = asdict(rates)
        if self._device.type != "cuda":
            self.record["ceilings_note"] = "a CPU has no TF32: its rate is that of float32"
        for precision, rate in asdict(rates).items():
            unit = "B/s" if precision == "copy" else "FLOP/s"
            say(f"ceiling {precision}: {rate:.4g} {unit}")
        return rates

    def run(self, layers: LayerSet, stages: Sequence[Stage], rates: Rates) -> None:
        """Prepare a block and run stages on it."""
        block = Block(layers, self._device)
        self._run_stage(PREPARATION, block, rates)
        for stage in stages:
            self._run_stage(stage, block, rates)
        del block
        self._free()

    def _run_stage(self, stage: Stage, block: Block, rates: Rates) -> None:
        spent = time.perf_counter() - self._start
        share = min(stage.share, self._limit - spent)
        units: list[dict[str, Any]] = []
        found: dict[str, Any] = {
            "model": block.layers.name,
            "stage": stage.name,
            "status": DONE,
            "share_seconds": share,
            "units": units,
        }
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        begin = time.perf_counter()
        try:
            with time_limit(share):
                if stage is not PREPARATION:
                    block.check_prepared()
                for unit in stage.run(block, rates, self._tokens):
                    units.append(asdict(unit))
                    show_unit(block.layers, stage, units[-1])
        except OutOfTime:
            found["status"] = "stopped"
            found["error"] = f"stopped after its share of {share:.0f} s"
        except Exception as error:
            found["status"] = "failed"
            found["error"] = f"{type(error).__name__}: {error}"
            found["traceback"] = traceback.format_exc()
        found["spent_seconds"] = time.perf_counter() - begin
        if self._device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
        if stage is not PREPARATION:
            found |= totals(block.layers, stage, found)
        self.record["stages"].append(found)
        show_stage(found)
        self.write()
        if found["status"] != DONE:
            self._free()

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            with suppress(RuntimeError):  # a device that has failed: the stages say so
                torch.cuda.empty_cache()

    def write(self) -> None:
        """Write what there is so far."""
        self.record["seconds"] = time.perf_counter() - self._start
        self.record["not_done"] = self.failed
        atomic_write(self._output, json.dumps(self.record, indent=1).encode())


def totals(layers: LayerSet, stage: Stage, found: dict[str, Any]) -> dict[str, Any]:
    """Seconds, floor and ratio of a block and of the model."""
    units = found["units"]
    seconds, floor = (sum(unit[key] for unit in units) for key in ("seconds", "floor"))
    result: dict[str, Any] = {
        "floor_counts": stage.counted,
        "block_seconds": seconds,
        "block_floor": floor,
        "ratio": seconds / floor if floor else None,
        "blocks": layers.blocks,
        "measured": "one decoder block; the model is the block times its blocks",
    }
    if found["status"] == DONE:  # a part of a block says nothing about the model
        result["model_seconds"] = layers.blocks * seconds
        result["model_floor"] = layers.blocks * floor
        target = stage.target.get(layers.name)
        if target is not None:
            certified = all(unit["figures"].get("certified", True) for unit in units)
            result["target_seconds"] = target
            result["target_met"] = layers.blocks * seconds <= target and certified
    return result


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` when the time is over; Python code notices at once."""

    def ring(*_: object) -> None:
        raise OutOfTime

    if seconds <= 0:
        raise OutOfTime
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def tf32(device: torch.device) -> Iterator[None]:
    """Let products of float32 matrices run in TF32, where a GPU has it."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def show_unit(layers: LayerSet, stage: Stage, unit: dict[str, Any]) -> None:
    """One line."""
    figures = " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in unit["figures"].items()
    )
    say(
        f"  {layers.name} {stage.name} {unit['name']} {unit['rows']}x{unit['width']}: "
        f"{unit['seconds']:.4f} s, floor {unit['floor']:.4f} s {figures}"
    )


def show_stage(found: dict[str, Any]) -> None:
    """Line of the table; what was not done is said in capitals."""
    head = f"{found['model']} {found['stage']}"
    if found["status"] != DONE:
        say(f"*** {head}: {found['status'].upper()}: {found['error']}")
    elif "model_seconds" in found:
        ratio = "no floor" if found["ratio"] is None else f"ratio {found['ratio']:.1f}x"
        target = ""
        if "target_seconds" in found:
            met = "met" if found["target_met"] else "MISSED"
            target = f", target {found['target_seconds']:g} s {met}"
        say(
            f"{head}: {found['block_seconds']:.3f} s a block x {found['blocks']} = "
            f"{found['model_seconds']:.2f} s, floor {found['model_floor']:.2f} s, "
            f"{ratio}{target}"
        )
    else:
        say(f"{head}: {found['spent_seconds']:.1f} s")


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages; 1 if one of them did not finish."""
    parser = argparse.ArgumentParser(description="the GPU programme")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--small", action="store_true", help="small shapes")
    parser.add_argument("--device", help="cuda or cpu; a GPU if there is one")
    options = parser.parse_args(arguments)
    found = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if found == "cpu" and not options.small:
        parser.error("there is no GPU: --small runs on a CPU")
    torch.set_float32_matmul_precision("highest")  # an image may have allowed less
    programme = Programme(options.output, torch.device(found), options.small)
    programme.write()  # a folder that is missing is no reason to lose a run
    rates = programme.measure()
    opt, largest = SMALL if options.small else FULL
    restored = SMALL_RESTORED if options.small else FULL_RESTORED
    for layers, stages in (
        (opt, STAGES),
        (restored, (RESTORATION,)),
        (largest, STAGES),
    ):
        programme.run(warm_up(layers), stages, rates)
        programme.run(layers, stages, rates)
    programme.write()
    seconds, lost = programme.record["seconds"], programme.failed or "nothing"
    say(f"{seconds:.0f} s in all, {options.output}; not done: {lost}")
    return 1 if programme.failed else 0


if __name__ == "__main__":
    sys.exit(main())

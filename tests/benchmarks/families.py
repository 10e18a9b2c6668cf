"""Every causal language model type of transformers, tiny and random, through a whole run.

    python -m tests.benchmarks.families OUT [--only NAME ...] [--jobs 2]
    python -m tests.benchmarks.families OUT --table

Every type is pruned to 2:4 by ``sparsegpt`` from its folder, verified, planned, opened by
stock transformers, and compared bit for bit with a run in memory. Each has a process of
its own with a limit of time and memory, so a crash or a hang is a row of the table.
Results are kept in ``OUT/families.jsonl`` as they come, and a repeated command goes on;
results of older code are computed again. The command fails if a row is a fault.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import re
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch._dynamo  # loaded once, before the processes are forked
import transformers.modeling_layers

from layerwise.experiments.results import ResultStore
from layerwise.experiments.sources import code_identity
from tests.support.families import FAMILIES, fields_of
from tests.support.family_run import Row, named, run_family

SECONDS, BYTES = 240, 12 << 30
MODULES = (
    "layerwise.run.prune",
    "layerwise.run.outputs.verify",
    "layerwise.planning.plan",
)
REFUSED = re.compile(
    r"[\d]+ weights of the blocks, (.*?) of their .* such as (.*); to leave"
)
WEIGHT = re.compile(r"\S*?\.\d+\.(\S+) \((called \d+ times|a parameter|[^)]*)")


def results(families: Sequence[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Rows of families, in the order in which their processes end."""
    waiting = list(families)
    running: dict[Connection, tuple[str, BaseProcess, float]] = {}
    fork = multiprocessing.get_context("fork")
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop(0)
            ours, theirs = fork.Pipe(duplex=False)
            process: BaseProcess = fork.Process(target=_child, args=(family, theirs))
            process.start()
            theirs.close()
            running[ours] = family, process, time.monotonic()
        ended = wait(list(running), timeout=1.0)
        for pipe, (family, process, start) in list(running.items()):
            seconds = time.monotonic() - start
            if pipe not in ended and seconds < SECONDS:
                continue
            row = _answer(family, process, pipe if pipe in ended else None)
            process.join()
            del running[pipe]
            yield {**asdict(row), "seconds": round(seconds, 1)}


def _child(family: str, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with TemporaryDirectory() as folder:
        try:
            row = run_family(family, Path(folder))
        except BaseException as error:
            row = Row(family, "fault", named(error))
    pipe.send(row)


def _answer(family: str, process: BaseProcess, pipe: Connection | None) -> Row:
    """Row that a process sent, or why it sent none; without pipe it is too slow."""
    if pipe is None:
        process.kill()
        return Row(family, "fault", f"not finished after {SECONDS} seconds")
    try:
        row: Row = pipe.recv()
    except EOFError:
        process.join()
        return Row(family, "fault", f"its process ended with {process.exitcode}")
    return row


@cache
def fingerprint(family: str) -> str:
    """Hash of the code and of the configuration of a family."""
    decisive = {
        "fields": repr(fields_of(family)),
        **code_identity("sparsegpt", MODULES),
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def table(store: ResultStore) -> list[str]:
    """Lines of Markdown: totals, and a row for every family that has a result."""
    rows = [row for family in FAMILIES if (row := find(store, family)) is not None]
    counts = Counter(row["result"] for row in rows)
    partly = sum(row["result"] == "pruned" and bool(row["reason"]) for row in rows)
    version = transformers.__version__
    return [
        f"{len(rows)} of {len(FAMILIES)} types of transformers {version}: "
        f"{counts['pruned']} pruned ({partly} of them after `ignore`), "
        f"{counts['refused']} refused, {counts['not built']} not built, "
        f"{counts['fault']} faults.",
        "",
        "| type | adapter | linears pruned | remark |",
        "|---|---|---|---|",
        *(
            f"| `{row['family']}` | {row['adapter'] or '-'} | {_extent(row)} "
            f"| {remark(row['reason'])} |"
            for row in rows
        ),
    ]


def find(store: ResultStore, family: str) -> dict[str, Any] | None:
    """Row of the code as it is now."""
    return store.find({"family": family}, fingerprint(family))


def _extent(row: Mapping[str, Any]) -> str:
    if row["result"] != "pruned":
        return str(row["result"])
    return f"{row['pruned']} of {row['linears']}"


def remark(reason: str) -> str:
    """Reason in short, for a cell of the table."""
    refused = REFUSED.search(reason)
    if refused is not None:
        weights = {name: why for name, why in WEIGHT.findall(refused[2])}
        listed = ", ".join(f"`{name}` ({why})" for name, why in weights.items())
        rest = reason.rpartition("; no plan of")[2] if "; no plan of" in reason else ""
        more = "; no plan: its path depends on values" if rest else ""
        return f"left dense, {refused[1]} of the blocks: {listed}{more}"
    return reason.replace("|", "\\|").replace("<", "\\<")


def main() -> None:
    """Complete the results, then print the table."""
    parser = argparse.ArgumentParser(description="Every decoder of transformers.")
    parser.add_argument("output", type=Path, help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="types to run again")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--table", action="store_true", help="only print what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)  # remarks of transformers on configurations
    warnings.simplefilter("ignore")
    arguments.output.mkdir(parents=True, exist_ok=True)
    store = ResultStore(arguments.output / "families.jsonl")
    missing = arguments.only or [f for f in FAMILIES if find(store, f) is None]
    for row in () if arguments.table else results(missing, arguments.jobs):
        store.add({"family": row["family"]}, fingerprint(row["family"]), row)
        sys.stderr.write(f"{row['family']}: {row['result']} {row['reason']}\n")
    sys.stdout.write("\n".join(table(store)) + "\n")
    rows = [find(store, family) for family in FAMILIES]
    sys.exit(any(row is not None and row["result"] == "fault" for row in rows))


if __name__ == "__main__":
    main()

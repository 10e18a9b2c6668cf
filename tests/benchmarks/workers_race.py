r"""Two workers against one on a run that is bound by its solver, and while they are killed.

    python -m tests.benchmarks.workers_race [--repeats 3]
    python -m tests.benchmarks.workers_race --kill-every 10 [--ray local] --width 256 \
        --blocks 24 --repeats 1

A random LLaMA of eight blocks (512 wide), 16 windows of 128 tokens, fista at 50 %, one
thread per worker, so two workers use two cores. The runs take turns; seconds are those of
the whole call, with the start of the workers. Every output is compared byte by byte, apart
from the seconds in its log. Where workers are killed, a block must take less time than they
have to live.
"""

import argparse
import hashlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from layerwise.run.prune import prune_model
from layerwise.timing.shapes import random_model

BLOCKS, WIDTH, VOCABULARY = 8, 512, 1024
WINDOWS, LENGTH = 16, 128


def checkpoint(folder: Path, blocks: int, width: int) -> Path:
    """Folder with a random model."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=LENGTH,
    )
    random_model(config, blocks, torch.float32, 0).save_pretrained(folder)
    return folder


def digest(folder: Path) -> str:
    """Hash of all files that do not tell times."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "layers.jsonl":
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


def workers_of(process: int) -> list[int]:
    """Processes below this one that prune: of ours, or actors of Ray."""
    found, pending = [], [process]
    while pending:
        parent = pending.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            pending += [int(child) for child in task.read_text().split()]
        try:
            line = Path(f"/proc/{parent}/cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if parent != process and ("spawn_main" in line or line.startswith("ray::_Actor")):
            found.append(parent)
    return found


@contextmanager
def killing(every: float | None) -> Iterator[list[int]]:
    """Kill a worker again and again while the block runs."""
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while every is not None and not over.wait(every):
            if workers := workers_of(os.getpid()):
                victim = workers[len(killed) % len(workers)]
                killed.append(victim)
                os.kill(victim, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Print seconds, their ratio, and whether the bytes agree."""
    parser = argparse.ArgumentParser(description="two workers against one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kill-every", type=float, default=None, help="seconds")
    parser.add_argument("--ray", default=None, help="local, or an address")
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--width", type=int, default=WIDTH)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=generator)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    digests, killed = set(), 0
    with tempfile.TemporaryDirectory() as folder:
        source = checkpoint(Path(folder) / "model", arguments.blocks, arguments.width)
        for repeat in range(arguments.repeats):
            for count, taken in seconds.items():
                out = Path(folder) / f"{count}-{repeat}"
                many: dict[str, Any] = {"workers": count}
                if count > 1:
                    many["ray"] = arguments.ray
                start = time.perf_counter()
                with killing(arguments.kill_every if count > 1 else None) as victims:
                    prune_model(
                        source,
                        "fista",
                        0.5,
                        calibration=ids,
                        n_sequences=WINDOWS,
                        sequence_length=LENGTH,
                        device="cpu",
                        output_dir=out,
                        **many,
                    )
                taken.append(time.perf_counter() - start)
                say(f"{count} workers: {taken[-1]:.1f} s, {len(victims)} killed")
                killed += len(victims)
                digests.add(digest(out))
    one, two = (statistics.median(taken) for taken in seconds.values())
    same = "the same bytes" if len(digests) == 1 else "DIFFERENT BYTES"
    say(
        f"1 worker {one:.1f} s, 2 workers {two:.1f} s: {one / two:.2f}x; "
        f"{killed} workers killed; {same} in {2 * arguments.repeats} runs"
    )


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Seconds of a training step of the packaged Mamba: our scan against that of transformers.

    python -m tests.benchmarks.mamba_scan

Forward and backward pass of two windows of 256 tokens, float32, one thread, in turns; the
least of three.
"""

import sys
import time

import torch

from layerwise.adapters.selective_scan import fast_scan
from layerwise.demo import model_path
from layerwise.run.checkpoints.storage import Checkpoint
from layerwise.run.models.opening import load_model

WINDOWS, LENGTH, RUNS = 2, 256, 3


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    model = load_model(Checkpoint.open(model_path("mamba"))).float()
    tokens = torch.arange(WINDOWS * LENGTH).view(WINDOWS, LENGTH) % 1000
    least: dict[str, float] = {}
    for _ in range(RUNS):
        for name, device in (("transformers", "meta"), ("ours", "cpu")):
            start = time.perf_counter()
            with fast_scan(model, torch.device(device)):  # only on a CPU it is ours
                output = model(input_ids=tokens, use_cache=False).logits
            output.logsumexp(-1).mean().backward()
            seconds = time.perf_counter() - start
            least[name] = min(least.get(name, seconds), seconds)
    lines = ["| scan | seconds |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in least.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

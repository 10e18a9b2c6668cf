"""Seconds of pruning a packaged model with `fista`; run by any version of this package.

    python -m tests.benchmarks.fista_first TOKENS MODEL        # once per version

TOKENS holds token ids of the calibration windows, shape (windows, length), saved by
``torch.save``; a file that is missing is made, by a version that has the demonstration.
MODEL is the folder of the model. Loading is not counted: both versions load alike. Run
this file by its path with PYTHONPATH at the root of an older version.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import layerwise
from layerwise.run.models.loading import load_tokenizer


def main() -> None:
    """Print one line."""
    parser = argparse.ArgumentParser(description="seconds of pruning a packaged model")
    parser.add_argument("tokens", type=Path)
    parser.add_argument("model", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.tokens.is_file():
        make_tokens(arguments.tokens, arguments.model)
    tokens = torch.load(arguments.tokens)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    start = time.perf_counter()
    report = layerwise.prune_model(
        model,
        "fista",
        0.5,
        calibration=tokens,
        sequence_length=tokens.shape[1],
        n_sequences=len(tokens),
        device="cpu",
    )
    seconds = time.perf_counter() - start
    solving = sum(record.seconds for record in report.records)
    sys.stdout.write(
        f"{layerwise.__file__}: {seconds:.2f} s, of which solving {solving:.2f} s, mean "
        f"relative error {report.mean_relative_error:.5f}\n"
    )


def make_tokens(path: Path, model: Path) -> None:
    """Save the windows of the demonstration."""
    from layerwise.demo import calibration_text
    from layerwise.run.checkpoints.storage import Checkpoint
    from layerwise.run.data.calibration import token_windows

    tokenizer = load_tokenizer(Checkpoint.open(model))
    assert tokenizer is not None
    windows = token_windows(
        [calibration_text()], tokenizer, n_sequences=64, sequence_length=256
    )
    torch.save(windows.tokens, path)


if __name__ == "__main__":
    main()

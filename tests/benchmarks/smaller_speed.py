"""Speed of models that lost 30 % of the parameters of their blocks.

    python -m tests.benchmarks.smaller_speed [--threads 2]

The packaged models are small enough to be bound by the overhead of every operation, so
that a few blocks of known shapes with random weights stand beside them. Both kinds are
pruned into stock folders, opened with stock transformers, and timed in turns with their
sources. Only shapes matter here: channels go by the size of their weights.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from layerwise import prune_model
from layerwise.demo import MODELS, model_path
from layerwise.run.models.loading import quiet_transformers
from layerwise.timing.shapes import SHAPES, random_model
from layerwise.timing.speed import measure_speed

SHAPED = {"opt-125m": 12, "opt-1.3b": 4, "llama-7b": 1, "mamba-130m": 4}  # blocks
SPARSITY = "0.3"
DTYPES = (torch.float32, torch.bfloat16)
CALIBRATION = torch.arange(64)[None]  # magnitude reads no inputs, a restoration neither


def sources(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name and checkpoint of every model."""
    for name in MODELS:
        yield f"packaged {name}", model_path(name)
    for name, blocks in SHAPED.items():
        path = folder / name
        with quiet_transformers():
            random_model(SHAPES[name](), blocks, torch.float32, 0).save_pretrained(path)
        yield f"{blocks} blocks of {name}", path


def block_parameters(model: Any) -> int:
    """Numbers in the parameters of all blocks."""
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)


def rows(folder: Path) -> Iterator[str]:
    """Lines of Markdown, as they are measured."""
    from transformers import AutoModelForCausalLM

    yield "| model | type | blocks' parameters | 1 x 128 | 16 x 128 | decoding |"
    yield "|---|---|---|---|---|---|"
    for number, (name, source) in enumerate(sources(folder)):
        output = folder / f"smaller-{number}"
        prune_model(
            source,
            "magnitude-sp",
            pattern="columns",
            sparsity=SPARSITY,
            calibration=CALIBRATION,
            n_sequences=1,
            sequence_length=CALIBRATION.numel(),
            output_dir=output,
        )
        for dtype in DTYPES:
            with quiet_transformers():
                before, after = (
                    AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
                    for path in (source, output)
                )
            dense, smaller = measure_speed([before, after])
            cells = [f"{block_parameters(after) / block_parameters(before):.3f}"]
            for work, faster in (
                *((dense.prefill[b], smaller.prefill[b]) for b in dense.prefill),
                (dense.decode, smaller.decode),
            ):
                milliseconds = 1e3 * work.latency
                cells.append(f"{work.speedup(faster):.2f}x of {milliseconds:.0f} ms")
            yield f"| {name} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Speed of smaller models.")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    torch.set_num_threads(parser.parse_args().threads)
    with tempfile.TemporaryDirectory(prefix="layerwise-speed-") as folder:
        for row in rows(Path(folder)):
            sys.stdout.write(f"{row}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Peak memory of a run on a checkpoint of 1.57 billion parameters, and what plan said.

    python -m tests.benchmarks.streamed_memory FOLDER [--method wanda] [--blocks 28]

Makes a LLaMA-shaped checkpoint (2048 wide, bfloat16, shards of 500 MB) in FOLDER, which
needs 11 GB, prunes it with 8 x 256 tokens in another process, and reads the anonymous
memory of that process (``RssAnon``) every 20 ms. Minutes of two cores.
"""

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

import torch

from layerwise.planning.plan import plan_run
from layerwise.run.prune import prune_model
from layerwise.timing.shapes import random_model

WIDTH, INNER, HEADS, VOCABULARY = 2048, 5632, 32, 32000
WINDOWS, LENGTH = 8, 256
MB = 1 << 20


def make(folder: Path, blocks: int) -> None:
    """A folder with a random model, once."""
    from transformers import LlamaConfig

    if (folder / "config.json").exists():
        return
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    model = random_model(config, blocks, torch.bfloat16, 0)
    model.save_pretrained(folder, max_shard_size="500MB")


def prune(source: Path, method: str, out: Path) -> None:
    """What is measured."""
    generator = torch.Generator().manual_seed(0)
    prune_model(
        source,
        method,
        0.5,
        calibration=torch.randint(VOCABULARY, (WINDOWS, LENGTH), generator=generator),
        n_sequences=WINDOWS,
        sequence_length=LENGTH,
        device="cpu",
        output_dir=out,
        force=True,
    )


def anonymous_memory(process: int | None) -> int:
    """Bytes; 0 for a process that has just ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return 1024 * int(lines[0].split()[1]) if lines else 0


def main() -> None:
    """Print size on the disk, the plan and the peak."""
    parser = argparse.ArgumentParser(description="peak memory of a streamed run")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--method", default="wanda")
    parser.add_argument("--blocks", type=int, default=28)
    arguments = parser.parse_args()
    source, out = arguments.folder / "model", arguments.folder / "pruned"
    start = multiprocessing.get_context("spawn").Process  # with memory of its own
    maker = start(target=make, args=(source, arguments.blocks))
    maker.start()
    maker.join()
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    planned = plan_run(
        source,
        arguments.method,
        0.5,
        n_sequences=WINDOWS,
        sequence_length=LENGTH,
        device="cpu",
    ).memory.bytes("host")
    begin, peak = time.perf_counter(), 0
    pruner = start(target=prune, args=(source, arguments.method, out))
    pruner.start()
    while pruner.is_alive():
        peak = max(peak, anonymous_memory(pruner.pid))
        time.sleep(0.02)
    sys.stdout.write(
        f"{size / MB:.0f} MiB on the disk; planned {planned / MB:.0f}, peak "
        f"{peak / MB:.0f} MiB: {peak / size:.3f} of the size, {peak / planned:.2f} of the "
        f"plan; {time.perf_counter() - begin:.0f} s, exit code {pruner.exitcode}\n"
    )


if __name__ == "__main__":
    main()

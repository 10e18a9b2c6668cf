"""Adapprox against AdamW: memory, time of a step, warm against cold starts, training.

    python -m tests.benchmarks.adapprox OUT
    python -m tests.benchmarks.adapprox OUT --only memory

Seconds are those of the processor in one thread, medians of steps that take turns. Training
results and the picture of the ranks, ``ranks.svg``, stay in ``OUT``.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from layerwise.solvers.adapprox import PUBLISHED, Adapprox
from layerwise.solvers.optimizer.memory import StateBytes, state_bytes
from layerwise.solvers.optimizer.second_moment import RankRule, update
from layerwise.solvers.optimizer.subspace import error_rate, subspace_iteration
from tests.benchmarks import adapprox_training
from tests.benchmarks.adapprox_training import OPTIMIZERS, Text, steps

BETA2 = 0.999
MAX_RANK = 0.25  # of the shorter side
MIB = 1 << 20
SIZES = {"117M": (12, 768), "345M": (24, 1024)}  # blocks, width of GPT-2
TIMED_RANKS = (1, 16, 64, 192)
WARM_RANKS = (4, 8, 16, 32)
WARM_STEPS = 60


def gpt2_shapes(blocks: int, width: int) -> list[tuple[int, ...]]:
    """Every parameter of GPT-2; the head is the embedding."""
    block: list[tuple[int, ...]] = [(width, 3 * width), (width, width)]
    block += [(width, 4 * width), (4 * width, width), (3 * width,), (4 * width,)]
    block += [(width,)] * 6  # two biases and two norms
    return [(50257, width), (1024, width), *block * blocks, (width,), (width,)]


# --- memory ------------------------------------------------------------------------------


def measured(
    shapes: Sequence[tuple[int, ...]], make: Callable[[list[nn.Parameter]], Optimizer]
) -> StateBytes:
    """Bytes after one real step, one parameter after the other so that it fits."""
    parts = []
    for shape in shapes:
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer = make([p])
        optimizer.step()
        parts.append(state_bytes(optimizer))
    return StateBytes(
        *(sum(getattr(part, name) for part in parts) for name in StateBytes.__annotations__)
    )


def computed(shapes: Sequence[tuple[int, ...]], beta1: float, fraction: float) -> int:
    """Bytes by the formula: (m + n) k for a matrix, fraction 0 being rank one."""
    numbers = 0
    for shape in shapes:
        size = torch.Size(shape).numel()
        rank = max(1, int(min(shape) * fraction))
        numbers += size if beta1 else 0
        numbers += sum(shape) * rank if len(shape) > 1 else size
    return 4 * numbers


def memory() -> Iterator[str]:
    """State of 117M measured, of 345M by the formula that the measurement confirms."""
    yield "| parameters | optimizer | first moment | second moment | total | saving |"
    yield "|---|---|---|---|---|---|"
    for name, (blocks, width) in SIZES.items():
        shapes = gpt2_shapes(blocks, width)
        size = 4 * sum(torch.Size(shape).numel() for shape in shapes)
        total = 2 * size
        if name == "117M":
            total = measured(shapes, AdamW).total
        yield _memory_row(name, "AdamW", StateBytes(size, size, total), total)
        for beta1 in (0.9, 0.0):
            for label, fraction in (("1", 0.0), ("a quarter", MAX_RANK)):
                whole = computed(shapes, beta1, fraction)
                first = size if beta1 else 0
                if name == "117M":
                    found = measured(shapes, _fixed_rank(beta1, fraction))
                    assert found.total == whole  # the formula may stand for 345M
                row = f"Adapprox, beta1 = {beta1}, rank {label}"
                yield _memory_row(name, row, StateBytes(first, whole - first, whole), total)


def _fixed_rank(beta1: float, fraction: float) -> Callable[[list[nn.Parameter]], Optimizer]:
    initial, threshold = (1 << 30, 0.0) if fraction else (1, 1.0)
    return lambda given: Adapprox(
        given,
        betas=(beta1, BETA2),
        initial_rank=initial,
        error_threshold=threshold,
        iterations=1,
    )


def _memory_row(name: str, optimizer: str, state: StateBytes, base: int) -> str:
    parts = (state.first_moment, state.second_moment, state.total)
    cells = " | ".join(f"{part / MIB:.1f} MiB" for part in parts)
    return f"| {name} | {optimizer} | {cells} | {1 - state.total / base:.2%} |"


# --- time of a step ----------------------------------------------------------------------


def step_times(repeats: int) -> Iterator[str]:
    """One block of GPT-2 117M, in turns with foreach AdamW."""
    shapes = [shape for shape in gpt2_shapes(1, 768) if shape[0] < 50257]
    yield "| rank | foreach AdamW | Adapprox | ratio | selecting step | cold | warm is |"
    yield "|---|---|---|---|---|---|---|"
    for rank in TIMED_RANKS:
        options: dict[str, Any] = {
            "initial_rank": rank,
            "max_rank": rank / 768,
            "error_threshold": 0.0,
        }
        given = [[nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(3)]
        optimizers: list[Optimizer] = [
            AdamW(given[0], foreach=True),
            Adapprox(given[1], select_every=repeats, **options),
            Adapprox(given[2], select_every=10**9, **{**PUBLISHED, **options}),
        ]
        seconds: list[list[float]] = [[], [], []]
        generator = torch.Generator().manual_seed(0)
        for _ in range(repeats + 1):
            for shape, *same in zip(shapes, *given, strict=True):
                gradient = torch.randn(shape, generator=generator)
                for p in same:
                    p.grad = gradient
            for optimizer, times in zip(optimizers, seconds, strict=True):
                times.append(_seconds(optimizer.step))
        base, ours, cold = (statistics.median(times[1:repeats]) for times in seconds)
        cells = [f"{1e3 * s:.1f} ms" for s in (base, ours, seconds[1][repeats], cold)]
        yield (
            f"| {rank} | {cells[0]} | {cells[1]} | {ours / base:.1f}x | {cells[2]} | "
            f"{cells[3]} | {cold / ours:.2f}x faster |"
        )


def _seconds(call: Callable[[], object]) -> float:
    """Processor time, for a busy machine would decide about wall time."""
    start = time.process_time()
    call()
    return time.process_time() - start


# --- warm against cold -------------------------------------------------------------------


def warm_and_cold(count: int) -> Iterator[str]:
    """Factors of exact second moments while LLaMA trains, by both kinds of start."""
    moments: dict[int, Tensor] = {}
    left: dict[tuple[int, int], Tensor] = {}
    seconds: dict[tuple[int, str], list[float]] = {}
    rates: dict[tuple[int, str], list[float]] = {}
    run = steps(OPTIMIZERS["AdamW"], Text.packaged(), count, 2)
    for number, (model, _, _) in enumerate(run):
        stacks: dict[tuple[int, ...], list[Tensor]] = {}
        for p in model.parameters():
            if p.ndim == 2:
                gradient = p.grad if p.shape[0] <= p.shape[1] else p.grad.mT
                stacks.setdefault(tuple(gradient.shape), []).append(gradient)
        for key, matrices in enumerate(stacks.values()):
            square = torch.stack(matrices).square_().mul_(1 - BETA2)
            V = moments[key] = square.add_(BETA2 * moments[key] if number else 0)
            generator = torch.Generator().manual_seed(number)

            def draw(
                member: int,
                present: int,
                width: int,
                V: Tensor = V,
                generator: torch.Generator = generator,
            ) -> Tensor:
                return torch.randn(V.shape[-1], width - present, generator=generator)

            for rank in WARM_RANKS:
                if number == 0:
                    left[key, rank], _ = subspace_iteration(V, rank, generator=generator)
                    continue
                for name, is_warm in (("cold", False), ("warm", True)):
                    rule = RankRule(1, rank, 0.0, 5, 5, warm_start=is_warm)
                    start = time.process_time()
                    Q, U = update(V, left[key, rank], rule, draw)
                    seconds.setdefault((rank, name), []).append(time.process_time() - start)
                    rates.setdefault((rank, name), []).append(
                        float(error_rate(V, U).mean())
                    )
                    if is_warm:  # the second, so that both start from the same matrix
                        left[key, rank] = Q
    yield "| rank | error rate, cold | error rate, warm | cold | warm | warm is faster by |"
    yield "|---|---|---|---|---|---|"
    for rank in WARM_RANKS:
        cold, warm = (statistics.mean(rates[rank, name]) for name in ("cold", "warm"))
        slow, fast = (sum(seconds[rank, name]) / count for name in ("cold", "warm"))
        yield (
            f"| {rank} | {cold:.4f} | {warm:.4f} | {1e3 * slow:.1f} ms | "
            f"{1e3 * fast:.1f} ms | {slow / fast:.2f}x |"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Adapprox against AdamW.")
    parser.add_argument("output", type=Path, help="folder of training results")
    parser.add_argument("--only", choices=("memory", "time", "warm", "train"))
    parser.add_argument("--steps", type=int, default=500, help="of training")
    parser.add_argument("--batch", type=int, default=8, help="windows of a training step")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "memory": memory,
        "time": lambda: step_times(options.repeats),
        "warm": lambda: warm_and_cold(WARM_STEPS),
        "train": lambda: iter(
            adapprox_training.table(options.output, options.steps, options.batch)
        ),
    }
    for name, part in parts.items():
        if options.only in (None, name):
            for line in part():
                sys.stdout.write(f"{line}\n")
                sys.stdout.flush()
            sys.stdout.write("\n")


if __name__ == "__main__":
    main()

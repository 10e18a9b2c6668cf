"""Memory and time of the largest LLaMAs on one accelerator: the tables of docs/plan.md.

``python -m layerwise.planning.scaling`` prints them. They follow from shapes and assumed
rates, so they are the same on every machine.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from layerwise.planning.advice import in_units
from layerwise.planning.costs import Cost
from layerwise.planning.memory_model import MemoryKind, memory_of
from layerwise.planning.shapes import BlockShape, ModelShape, RunShape, StageShape
from layerwise.planning.solver_costs import cost_of
from layerwise.planning.workspace import Workspace
from layerwise.solvers import get_solver
from layerwise.timing.floor import Work, gram_work

BASE = 512 << 20  # Python, PyTorch and transformers
N_SEQUENCES, LENGTH = 128, 2048
HEAD = 128  # channels of a head
METHODS = ("wanda", "sparsegpt", "fista")
MODES = ("block", "sequential")
RATES: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.bfloat16: 790e12, torch.float32: 60e12, torch.float64: 60e12}
)
"""Operations per second of one H200."""
DISK_RATE = 4e9  # bytes per second


@dataclass(frozen=True)
class Llama:
    """A model of the LLaMA family in bfloat16.

    Parameters
    ----------
    name
        Name of the model.
    hidden, inner
        Channels between the blocks, and inside the MLP.
    blocks
        Number of blocks.
    heads, groups
        Heads of queries, and of keys and values.
    vocabulary
        Rows of the embedding and of the output head, which are not tied.
    """

    name: str
    hidden: int
    inner: int
    blocks: int
    heads: int
    groups: int
    vocabulary: int

    @property
    def stages(self) -> tuple[StageShape, ...]:
        """Stages of a block: queries, keys and values; output; gate and up; down."""
        queries, keys = self.heads * HEAD, self.groups * HEAD
        return (
            StageShape(self.hidden, (queries, keys, keys)),
            StageShape(queries, (self.hidden,), passes_through=True),
            StageShape(self.hidden, (self.inner, self.inner)),
            StageShape(self.inner, (self.hidden,)),
        )

    @property
    def shape(self) -> ModelShape:
        """Shapes for the memory model."""
        weights = sum(stage.weights for stage in self.stages)
        block = BlockShape(weights + 2 * self.hidden, self.stages)
        table = self.vocabulary * self.hidden
        itemsize = torch.bfloat16.itemsize
        return ModelShape(
            blocks=(block,) * self.blocks,
            embeddings=table + self.hidden,
            head=table,
            largest=table,
            hidden=self.hidden,
            itemsize=itemsize,
            working=((1, llama_working(self.hidden, self.inner, itemsize)),),
        )


LLAMAS = (
    Llama("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256),
    Llama("Llama-3-70B", 8192, 28672, 80, 64, 8, 128256),
    Llama("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128256),
)


def llama_working(hidden: int, inner: int, itemsize: int) -> float:
    """Bytes per token inside a block: two hidden states, three activations of the MLP."""
    return float(itemsize * (2 * hidden + 3 * inner))


def run_shape(cost: Cost, mode: str) -> RunShape:
    """Run with the default calibration set on one accelerator, hidden states in files."""
    return RunShape(
        n_sequences=N_SEQUENCES,
        length=LENGTH,
        error_correction=mode,
        base=BASE,
        accelerator=True,
        workspace=Workspace(cost.peaks),
        on_disk=True,
    )


def work_of(model: Llama, cost: Cost, mode: str) -> dict[str, Work]:
    """Work that a run cannot avoid, by stage."""
    tokens = N_SEQUENCES * LENGTH
    shape, pair = model.shape, mode == "block"
    matrices = 2.0 * tokens * sum(block.weights for block in shape.blocks)
    attention = 2.0 * tokens * LENGTH * model.heads * HEAD * model.blocks
    passes = 2  # one to the end of a block, one through its pruned or dense half
    widths = [stage.width for stage in model.stages] * model.blocks
    pairs = [pair and index > 0 for index in range(len(model.stages))] * model.blocks
    grams = gram_work(widths, pairs, tokens).total_flops
    solving = Work()
    for stage in model.stages:
        solving += cost.work(stage)
    total = {dtype: count * model.blocks for dtype, count in solving.flops.items()}
    size = float(shape.itemsize * shape.parameters)
    return {
        "read, hash, write": Work(bytes=3 * size),
        "forward": Work({torch.bfloat16: passes * (matrices + attention)}),
        "gram": Work({torch.bfloat16: grams}),
        "solve": Work(total),
    }


def seconds_of(work: Work) -> float:
    """Least seconds at the assumed rates."""
    products = sum(count / RATES[dtype] for dtype, count in work.flops.items())
    return products + work.bytes / DISK_RATE


def _cost(method: str, mode: str) -> Cost:
    cost = cost_of(get_solver(method), pair=mode == "block")
    assert cost is not None
    return cost


def memory_rows() -> Iterator[tuple[str, ...]]:
    """Model, method, mode, device peak, its largest item, host peak, files."""
    for model in LLAMAS:
        for method in METHODS:
            for mode in MODES:
                run = run_shape(_cost(method, mode), mode)
                shape = model.shape
                memory = memory_of(shape, run)
                kinds: tuple[MemoryKind, ...] = ("device", "host")
                device, host = (memory.peak(kind) for kind in kinds)
                items = [item for item in device.items if item.kind == "device"]
                largest = max(items, key=lambda item: item.bytes)
                files = 2 * run.tokens * shape.hidden * shape.itemsize
                yield (
                    model.name,
                    f"`{method}`",
                    f"`{mode}`",
                    in_units(device.total("device")),
                    f"{largest.name}, {in_units(largest.bytes)}",
                    in_units(host.total("host")),
                    in_units(files),
                )


def time_rows() -> Iterator[tuple[str, ...]]:
    """Model, method, minutes of every stage, and the total in hours."""
    for model in LLAMAS:
        for method in METHODS:
            work = work_of(model, _cost(method, "block"), "block")
            seconds = [seconds_of(part) for part in work.values()]
            minutes = (f"{value / 60:,.1f}" for value in seconds)
            yield (model.name, f"`{method}`", *minutes, f"{sum(seconds) / 3600:,.2f}")


MEMORY_COLUMNS = (
    *("model", "method", "error correction", "device", "most of it"),
    *("host", "hidden states in files"),
)
TIME_COLUMNS = (
    *("model", "method", "read, hash, write (min)", "forward (min)", "gram (min)"),
    *("solve (min)", "all (h)"),
)


def markdown(columns: Sequence[str], rows: Iterator[tuple[str, ...]]) -> str:
    """Format a table in Markdown."""
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def tables() -> tuple[str, str]:
    """Tables of memory and time, as in docs/plan.md."""
    return markdown(MEMORY_COLUMNS, memory_rows()), markdown(TIME_COLUMNS, time_rows())


if __name__ == "__main__":
    sys.stdout.write("\n".join(tables()))

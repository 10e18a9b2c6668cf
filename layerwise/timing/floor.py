"""The floor of a stage: the least time it could take here, counted work over rates.

The counted work is unavoidable for every implementation: the products of the forward
passes, half of each symmetric gram, one product per matrix to grade its answer, and the
bytes that are read and written. The rates are measured in the same process: the fastest
matrix product of each type, and a copy in memory. A stage without such work has no floor.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from layerwise.adapters import Adapter
from layerwise.adapters.linear import is_linear, matrix
from layerwise.gram import precision_of

GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
TRIES = 5
LEAST_SECONDS = 1.0  # total of the tries: long enough for one without other load


@dataclass(frozen=True)
class Work:
    """Operations by data type, and bytes that are read or written."""

    flops: Mapping[torch.dtype, float] = field(default_factory=dict)
    bytes: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        flops = dict(self.flops)
        for dtype, count in other.flops.items():
            flops[dtype] = flops.get(dtype, 0.0) + count
        return Work(flops, self.bytes + other.bytes)

    @property
    def total_flops(self) -> float:
        """Operations of all types."""
        return sum(self.flops.values())


class Machine:
    """Rates of a device, measured at their first use.

    Parameters
    ----------
    device
        Where the run computes.
    gemm_size
        Order of the square matrices; the default depends on the device.
    copy_bytes
        Bytes that are copied; the default depends on the device.
    least_seconds
        Total time of the tries of one rate; a second by default.
    """

    def __init__(
        self,
        device: torch.device,
        gemm_size: int | None = None,
        copy_bytes: int | None = None,
        least_seconds: float | None = None,
    ) -> None:
        self.device = device
        self._least_seconds = LEAST_SECONDS if least_seconds is None else least_seconds
        self._gemm_size = gemm_size or GEMM_SIZE.get(device.type, 1024)
        self._copy_bytes = copy_bytes or COPY_BYTES.get(device.type, 1 << 28)
        self.gemm_rates: dict[torch.dtype, float] = {}
        self._copy_rate = 0.0

    def gemm_rate(self, dtype: torch.dtype) -> float:
        """Operations per second of the fastest of a few square products."""
        if dtype not in self.gemm_rates:
            n = self._gemm_size
            # random numbers: a GPU is faster where few bits change
            a, b = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            self.gemm_rates[dtype] = 2 * n**3 / self._best(lambda: torch.mm(a, b, out=out))
        return self.gemm_rates[dtype]

    @property
    def copy_rate(self) -> float:
        """Bytes per second, read plus written, of the fastest of a few copies."""
        if not self._copy_rate:
            size = self._copy_bytes
            a = torch.ones(size, dtype=torch.uint8, device=self.device)
            b = torch.empty_like(a)
            self._copy_rate = 2 * size / self._best(lambda: b.copy_(a))
        return self._copy_rate

    def floor(self, work: Work) -> float:
        """Seconds of the work at full rate; products and traffic overlap."""
        products = sum(
            count / self.gemm_rate(dtype) for dtype, count in work.flops.items() if count
        )
        return max(products, work.bytes / self.copy_rate if work.bytes else 0.0)

    def _best(self, run: Callable[[], Any]) -> float:
        tries, spent, best = 0, 0.0, math.inf
        while tries <= TRIES or spent < self._least_seconds:
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
            tries, spent = tries + 1, spent + seconds
            if tries > 1:  # the first one is a warm-up
                best = min(best, seconds)
        return best


def block_config(model: Any, index: int) -> Any:
    """Configuration of one decoder block, by its index; sizes may differ by block."""
    config = model.config.get_text_config()
    if getattr(config, "is_heterogeneous", False):
        return config.per_layer_config[index]
    return config


def forward_work(
    block: nn.Module,
    config: Any,
    tokens: int,
    length: int,
    skipped: Collection[nn.Module] = (),
) -> Work:
    """Work of one pass of a block: products of its linears and of causal attention.

    Parameters
    ----------
    block
        The block.
    config
        Configuration of the model or of the block, for the heads.
    tokens, length
        Total number of tokens, and tokens of a sequence.
    skipped
        Linears whose outputs are not needed.
    """
    used = [m for m in block.modules() if is_linear(m) and m not in skipped]
    linears = [matrix(module) for module in used]
    flops = sum(2.0 * tokens * weight.numel() for weight in linears)
    heads = getattr(config, "num_attention_heads", None)
    if heads:
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        # scores, and their product with the values; half of each is masked
        flops += 2 * (2.0 * tokens * length * heads * head) / 2
    weight = next(block.parameters())
    return Work({weight.dtype: flops}, float(sum(p.nbytes for p in block.parameters())))


def gram_work(
    widths: Sequence[int],
    pairs: Sequence[bool],
    tokens: int,
    dtype: torch.dtype = torch.float32,
) -> Work:
    """Work of the second moments: half of each gram, and all of each cross-gram.

    Parameters
    ----------
    widths
        Number of inputs of each stage.
    pairs
        Whether a stage has different inputs in the dense and in the pruned model.
    tokens
        Total number of tokens.
    dtype
        Data type of the products, see :func:`layerwise.gram.precision_of`.
    """
    flops = 0.0
    for width, pair in zip(widths, pairs, strict=True):
        flops += tokens * width * (width + 1.0) + pair * 2.0 * tokens * width**2
    return Work({dtype: flops})


def grading_work(shapes: Sequence[tuple[int, int]]) -> Work:
    """Work of grading, for every method: one float64 product of each answer and gram."""
    return Work({torch.float64: sum(2.0 * out * width**2 for out, width in shapes)})


def run_work(
    model: Any,
    adapter: Adapter,
    shapes: Mapping[str, tuple[int, int]],
    error_correction: str,
    tokens: int,
    length: int,
    device: torch.device,
) -> dict[str, Work]:
    """Work of the stages forward, gram and solve of a run over a model.

    Parameters
    ----------
    model, adapter
        The model and its adapter.
    shapes
        Shape (out, in) of every pruned matrix, by its full name.
    error_correction
        Mode of the run, which decides the number of passes.
    tokens, length
        Total number of tokens, and tokens of a sequence.
    device
        Where the run computes.
    """
    forward, widths, pairs = Work(), [], []
    blocks = adapter.blocks_of(model)
    for number, (name, block) in enumerate(blocks.items()):
        ends = [adapter.linear(block, end) for end in adapter.stages_of(name)[-1].linears]
        config = block_config(model, number)
        whole = forward_work(block, config, tokens, length)
        inside = forward_work(block, config, tokens, length, ends)
        # the output of the last block is not used: its last linears need not be computed
        through = inside if number == len(blocks) - 1 else whole
        forward += _passes(error_correction, inside, through)
        pruned = [
            [f"{name}.{linear}" for linear in stage.linears if f"{name}.{linear}" in shapes]
            for stage in adapter.stages_of(name)
        ]
        for index, linears in enumerate([names for names in pruned if names]):
            widths.append(shapes[linears[0]][1])
            first = index == 0 and (error_correction == "block" or number == 0)
            pairs.append(error_correction in ("block", "full") and not first)
    return {
        "forward": forward,
        "gram": gram_work(widths, pairs, tokens, precision_of(model.dtype, device)),
        "solve": grading_work(list(shapes.values())),
    }


def _passes(error_correction: str, inside: Work, through: Work) -> Work:
    """Passes over one block: `inside` collects inputs, `through` computes the output."""
    if error_correction == "none":
        return through  # one pass does both
    if error_correction == "sequential":
        return inside if through is inside else inside + through
    if error_correction == "block":
        return through + inside  # the dense, then the pruned stream
    return through + through
